"""Reading of an address book from the lines of one or several files into the table of owners. Pure."""

from collections.abc import Iterable, Sequence

from whaled.errors import BookError, BookFailure, Fault
from whaled.whales.bookkeys import Network
from whaled.whales.booklines import LineFaultError, Lines
from whaled.whales.owners import MAX_LABELS, Owners, Packer

# Maximum number of unusable lines that are named; the others are counted, because the whole text becomes one log line.
MAX_FAULTS = 20
# Maximum average number of lines for each allowed address: memory must not grow with repetitions in a file.
MAX_LINES_EACH = 8
CUT_SHORT = "; the file ends here, amid a line: was it cut short?"
_TESTS = {Network.TESTNET, Network.REGTEST, Network.ANY_TEST}


class Reading:
    """The reading of one book's files, in order. The first owner of an address is the one that was read first.

    `limit` is the maximum number of addresses, None for no limit. Entries above it, or above `MAX_LINES_EACH` lines for
    each allowed address, are counted but not kept.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.entries = 0
        self._limit = limit
        self._is_full = False
        # The number of entries at which the addresses are counted next.
        self._count_at = (limit or 0) + 1
        self._packer = Packer()
        self._faults: list[Fault] = []
        self._wrong_lines = 0
        # The file and line of the first address of each network.
        self._first: dict[Network, tuple[str, int]] = {}
        self._counts = dict.fromkeys(Network, 0)
        self._names: list[str] = []

    def add(self, name: str, lines: Iterable[str]) -> bool:
        """Read a file. Return whether it had any content: an entry, or an unusable line."""
        self._names.append(name)
        before = self.entries + self._wrong_lines
        book = Lines()
        ends_lines = False
        for number, line in enumerate(lines, start=1):
            is_whole = line.endswith("\n")
            try:
                entry = book.entry(line)
            except LineFaultError as error:
                problem = f"{error}{CUT_SHORT}" if ends_lines and not is_whole else str(error)
                self._add_fault(Fault(f"line {number}", problem, name))
                continue
            finally:
                ends_lines = is_whole
            if entry is None:
                continue
            self.entries += 1
            if self._limit is not None and self.entries > self._limit and not self._has_room(self._limit):
                continue
            self._packer.add(self.entries, entry)
            self._counts[entry.network] += 1
            if entry.network not in self._first:
                self._first[entry.network] = (name, number)
        return self.entries + self._wrong_lines > before

    def owners(self) -> Owners:
        """Return the table of everything read; the reading cannot be continued.

        Raises BookError with a fault for each of the first `MAX_FAULTS` unusable lines, or for exceeding the limit.
        """
        if self._limit is not None and self.entries > self._limit:
            self._require_fitting(self._limit)
        if self._faults:
            faults = list(self._faults)
            more = self._wrong_lines - len(faults)
            if more:
                last = faults[-1].source if len(self._names) == 1 else ""
                faults.append(Fault("", f"and {more} more lines cannot be used", last))
            raise BookError(tuple(faults), reason=BookFailure.FAULTS, lines=self._wrong_lines)
        return self._packer.packed(self._notes)

    def _has_room(self, limit: int) -> bool:
        """Return whether one more entry may be kept.

        Addresses are counted only occasionally, so at most an eighth more than the limit are kept.
        """
        if self.entries > MAX_LINES_EACH * limit:
            self._is_full = True
        elif not self._is_full and self.entries >= self._count_at:
            addresses = self._packer.addresses()
            self._is_full = addresses > limit
            self._count_at = self.entries + max(limit - addresses, limit // 8) + 1
        return not self._is_full

    def _require_fitting(self, limit: int) -> None:
        """Raise BookError for more addresses than the limit, or for more lines than the limit allows."""
        addresses = self._packer.addresses()
        names = f"{', '.join(self._names)} {'have' if self._names[1:] else 'has'}"
        if addresses > limit:
            least = "at least " if self._is_full else ""
            problem = f"{names} {least}{addresses} addresses, {limit} are allowed: raise the limit, or take some out"
        elif self._is_full:
            problem = (
                f"{names} {self.entries} lines with an address, at most {MAX_LINES_EACH * limit} are allowed, "
                f"{MAX_LINES_EACH} for each of {limit} addresses: raise the limit, or take repeated lines out"
            )
        else:
            return
        raise BookError((Fault("detection.max_book_addresses", problem),), reason=BookFailure.TOO_LARGE)

    def _add_fault(self, fault: Fault) -> None:
        self._wrong_lines += 1
        if len(self._faults) < MAX_FAULTS:
            self._faults.append(fault)

    def _notes(self, packer: Packer) -> Sequence[str]:
        notes = []
        if packer.left_out:
            notes.append(f"{packer.left_out:,} labels are left out: an address has the first {MAX_LABELS}")
        if packer.contradictions:
            notes.append(
                f"{packer.contradictions:,} lines give an address its label again with another type: the first counts"
            )
        tests = sum(self._counts[network] for network in _TESTS)
        mains = self._counts[Network.MAINNET]
        if tests and mains:
            fewer = _TESTS if tests <= mains else {Network.MAINNET}
            for network in sorted(fewer & self._first.keys()):
                name, number = self._first[network]
                notes.append(
                    f"{name}: line {number}: the first of {self._counts[network]:,} addresses of {network.title}, "
                    f"among {max(tests, mains):,} of {'mainnet' if mains >= tests else 'test networks'}: a backend "
                    "shows those of its own network"
                )
        return notes


def parse(lines: Iterable[str], source: str, *, limit: int | None = None) -> Owners:
    """Return the owners in the lines of one file; `source` is its name. Raises BookError."""
    reading = Reading(limit)
    reading.add(source, lines)
    return reading.owners()
