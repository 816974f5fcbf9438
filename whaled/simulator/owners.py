"""Owners of addresses in the simulated world, all invented, and the address book that lists them.

Their addresses are the same in every world, whatever its seed: one book of each
network fits all. `BOOKS` has what `book` gives.
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
    """Somebody who does not exist. `weight` is how often it takes part, compared with the others."""

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
    """The scripts of an owner; the same each time."""
    scripts = Scripts(network, Random(owner.label))  # noqa: S311 -- reproducible, nothing secret
    return tuple(scripts.make(_TYPES[index % len(_TYPES)]) for index in range(ADDRESSES_EACH))


def book(network: Network) -> str:
    """The address book of all owners on a network, as CSV for `detection.address_book`."""
    lines = [
        f"{owner.label},{script.address},{owner.type}\n" for owner in OWNERS for script in scripts_of(owner, network)
    ]
    return HEADER + "".join(lines)


class Owners:
    """Draws owners for one world. With a `share` of 0 nobody takes part, and `rng` is left alone."""

    def __init__(self, network: Network, rng: Random, share: float) -> None:
        self._rng = rng
        self._share = share
        self._scripts = {owner.label: scripts_of(owner, network) for owner in OWNERS} if share else {}
        self._owner = {script.hex: label for label, scripts in self._scripts.items() for script in scripts}

    def draw(self) -> Script | None:
        """A script of some owner, `share` of the time."""
        if not self._share or self._rng.random() >= self._share:
            return None
        (owner,) = self._rng.choices(OWNERS, [owner.weight for owner in OWNERS])
        return self._rng.choice(self._scripts[owner.label])

    def sibling(self, script: Script) -> Script | None:
        """Another script of the same owner, as for change; None if the script is nobody's."""
        label = self._owner.get(script.hex)
        return None if label is None else self._rng.choice([each for each in self._scripts[label] if each != script])
