"""Validation of addresses from operators and clients, and their conversion to the backend's form. Pure."""

import unicodedata
from hashlib import sha256

from whaled.addresses import (
    BASE58,
    BASE58_VERSIONS,
    BECH32,
    BECH32_REST,
    BECH32M_REST,
    SEGWIT_PREFIXES,
)
from whaled.addresses import expanded as _expanded
from whaled.addresses import polymod as _polymod

# The value of a character that is not in an alphabet.
NONE = 255
# Texts that are mistaken for Bitcoin addresses: how they begin, in lower case, and what they are.
_FOREIGN_STARTS = {
    "bitcoin:": "is a payment link (BIP 21): write the address alone, without bitcoin:",
    "ltc1": "is an address of Litecoin",
    "bitcoincash:": "is an address of Bitcoin Cash",
    "0x": "is an address of Ethereum or another EVM chain",
    "lq1": "is an address of Liquid",
    "ex1": "is an address of Liquid",
    "ert1": "is an address of Liquid",
    "lnbc": "is a Lightning invoice",
    "lntb": "is a Lightning invoice",
    "xpub": "is an extended public key: a book has the addresses derived from it",
    "ypub": "is an extended public key: a book has the addresses derived from it",
    "zpub": "is an extended public key: a book has the addresses derived from it",
    "sp1": "is a silent payment address (BIP 352): it never appears in the chain",
    "t1": "is an address of Zcash",
}
# Base58 version bytes of other chains.
_FOREIGN_VERSIONS = {
    0x30: "Litecoin",
    0x32: "Litecoin",
    0x1E: "Dogecoin",
    0x16: "Dogecoin",
    0x4C: "Dash",
    0x10: "Dash",
    0x41: "Tron",
    0x27: "Liquid",
    0x39: "Liquid",
}


def _values(alphabet: str) -> bytes:
    """Return the table for `bytes.translate` that maps each character to its value in an alphabet."""
    return bytes(alphabet.find(chr(code)) % 256 for code in range(256))


_BECH32_VALUES = _values(BECH32)
_BASE58_VALUES = _values(BASE58)
_PREFIX_RESTS = {prefix: _polymod(_expanded(prefix)) for prefix in SEGWIT_PREFIXES}
_SEGWIT_STARTS = tuple(f"{prefix}1" for prefix in SEGWIT_PREFIXES)


def canonical(address: str) -> str:
    """Return an address in the backend's form: bech32 in lower case, although it may be given in upper case."""
    lower = address.lower()
    return lower if lower.startswith(_SEGWIT_STARTS) else address


def fault_in(address: str) -> str | None:
    """Return the fault in an address of any Bitcoin network, None if it is valid (BIP 173, BIP 350, base58check)."""
    problem = _fault_in(address)
    if problem is None or address.isascii():
        return problem
    odd = next(letter for letter in address if not letter.isascii())
    return f"has a character that no address has: U+{ord(odd):04X} {unicodedata.name(odd, 'without a name')}"


def _fault_in(address: str) -> str | None:
    lower = address.lower()
    for prefix in SEGWIT_PREFIXES:
        if lower.startswith(f"{prefix}1"):
            if address not in (lower, address.upper()):
                return "mixes capital and small letters"
            return _segwit_fault(prefix, lower[len(prefix) + 1 :])
    problem = _base58_fault(address)
    if problem is None:
        return None
    return next((what for start, what in _FOREIGN_STARTS.items() if lower.startswith(start)), problem)


def _segwit_fault(prefix: str, data: str) -> str | None:
    values = data.encode("ascii", "replace").translate(_BECH32_VALUES)
    if NONE in values:
        return f"has a character that bech32 does not use: {data[values.index(NONE)]!r}"
    if not 8 <= len(values) <= 90:
        return "has a wrong length"
    version = values[0]
    if _polymod(values, _PREFIX_RESTS[prefix]) != (BECH32_REST if version == 0 else BECH32M_REST):
        return "has a wrong checksum: a character is mistyped"
    program_bits = 5 * (len(values) - 7)
    program_bytes = program_bits // 8
    lengths_allowed = (20, 32) if version == 0 else range(2, 41)
    if version > 16 or program_bits % 8 > 4 or program_bytes not in lengths_allowed:
        return "has a wrong length"
    return None


def _base58_fault(address: str) -> str | None:
    number = 0
    if not 26 <= len(address) <= 35:
        return "is not a Bitcoin address: expected bc1..., 1... or 3... (tb1, bcrt1, m, n, 2 on test networks)"
    digits = address.encode("ascii", "replace").translate(_BASE58_VALUES)
    if NONE in digits:
        return f"has a character that base58 does not use: {address[digits.index(NONE)]!r}"
    for digit in digits:
        number = number * 58 + digit
    if number.bit_length() > 200:
        return "has a wrong length"
    payload = number.to_bytes(25)
    if sha256(sha256(payload[:21]).digest()).digest()[:4] != payload[21:]:
        return "has a wrong checksum: a character is mistyped"
    if payload[0] not in BASE58_VERSIONS:
        other = _FOREIGN_VERSIONS.get(payload[0])
        return f"is an address of {other}" if other is not None else "is not of a Bitcoin network"
    return None
