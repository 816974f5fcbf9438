"""Address books of any length."""

from functools import cache

from whaled.addresses import base58check
from whaled.model import OwnerType


@cache
def address(number: int) -> str:
    """Return an address, a different one for each number."""
    return base58check(0, number.to_bytes(20))


def book(count: int) -> list[str]:
    """Return lines for `count` addresses, with seven labels and three types."""
    kinds = list(OwnerType)
    return [f"Owner {number % 7},{address(number)},{kinds[number % 3]}" for number in range(count)]
