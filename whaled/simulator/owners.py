"""The invented owners of addresses in the simulated world, and the address books that list them.

Their addresses do not depend on the seed, so one book per network fits every world. The files in `BOOKS` contain the
output of `book`.
"""

from pathlib import Path
from random import Random

from msgspec import Struct

from whaled.model import OwnerType
from whaled.simulator.scripts import Network, Script, Scripts, ScriptType

BOOKS = {
    Network.MAINNET: Path(__file__).with_name("owners.csv"),
    Network.REGTEST: Path(__file__).with_name("owners-regtest.csv"),
}
HEADER = """\
# Invented. These owners exist in the world of `whaled simulate` and `whaled run --simulate` only, and nobody has keys
# to their addresses: a book for trying whaled out.
label,address,type
"""
ADDRESSES_EACH = 6
# Types whose outputs have an address.
_TYPES = (ScriptType.P2WPKH, ScriptType.P2TR, ScriptType.P2SH, ScriptType.P2PKH, ScriptType.P2WSH)


class InventedOwner(Struct, frozen=True):
    """An invented owner. `weight` is its relative frequency in transactions."""

    label: str
    type: OwnerType
    weight: int


OWNERS = (
    InventedOwner("Invented Exchange Alder", OwnerType.EXCHANGE, 6),
    InventedOwner("Invented Exchange Birch", OwnerType.EXCHANGE, 5),
    InventedOwner("Invented Exchange Cedar", OwnerType.EXCHANGE, 3),
    InventedOwner("Invented Custodian Elm", OwnerType.CUSTODIAN, 3),
    InventedOwner("Invented Pool Hazel", OwnerType.MINER, 2),
    InventedOwner("Invented Fund Juniper", OwnerType.FUND, 2),
    InventedOwner("Invented Payments Linden", OwnerType.SERVICE, 1),
    InventedOwner("Invented Treasury Maple", OwnerType.GOVERNMENT, 1),
)


def scripts_of(owner: InventedOwner, network: Network) -> tuple[Script, ...]:
    """Return the scripts of an owner, always the same."""
    scripts = Scripts(network, Random(owner.label))  # noqa: S311 -- reproducible, nothing secret
    return tuple(scripts.make(_TYPES[index % len(_TYPES)]) for index in range(ADDRESSES_EACH))


def book(network: Network) -> str:
    """Return the address book of all owners on a network, as CSV for `detection.address_book`."""
    lines = [
        f"{owner.label},{script.address},{owner.type}\n" for owner in OWNERS for script in scripts_of(owner, network)
    ]
    return HEADER + "".join(lines)


class Owners:
    """A random source of owners for one world. With a `share` of 0 it returns none and does not use `rng`."""

    def __init__(self, network: Network, rng: Random, share: float) -> None:
        self._rng = rng
        self._share = share
        self._scripts = {owner.label: scripts_of(owner, network) for owner in OWNERS} if share else {}
        self._owner = {script.hex: label for label, scripts in self._scripts.items() for script in scripts}

    def draw(self) -> Script | None:
        """Return a script of a random owner with probability `share`, else None."""
        if not self._share or self._rng.random() >= self._share:
            return None
        (owner,) = self._rng.choices(OWNERS, [owner.weight for owner in OWNERS])
        return self._rng.choice(self._scripts[owner.label])

    def sibling(self, script: Script) -> Script | None:
        """Return another script of the same owner, as for change; None if the script belongs to no owner."""
        label = self._owner.get(script.hex)
        return None if label is None else self._rng.choice([each for each in self._scripts[label] if each != script])
