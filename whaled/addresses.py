"""Bitcoin addresses: base58check, bech32 (BIP 173) and bech32m (BIP 350). Pure.

Encoding, addresses of scripts, validation of addresses from operators and clients, and their form at the backend.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import reduce
from hashlib import sha256
from operator import xor

from msgspec import Struct

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
# The value to XOR for each value of the five bits that are shifted out at the top.
_STEPS = tuple(
    reduce(xor, (generator for bit, generator in enumerate(GENERATOR) if top >> bit & 1), 0) for top in range(32)
)
# The final values of the checksum of BIP 173 (witness version 0) and of BIP 350 (later versions).
BECH32_REST = 1
BECH32M_REST = 0x2BC830A3
# Human-readable parts and base58 version bytes of mainnet, testnet/signet and regtest.
SEGWIT_PREFIXES = ("bc", "tb", "bcrt")
BASE58_VERSIONS = frozenset({0x00, 0x05, 0x6F, 0xC4})
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


class Network(Struct, frozen=True):
    """The address parameters of a network: its bech32 prefix, None if it is unknown, and its base58 versions."""

    segwit: str | None
    pubkey_hash: int
    script_hash: int


MAIN = Network("bc", 0x00, 0x05)
_TEST_VERSIONS = (0x6F, 0xC4)


def network_of(address: str) -> Network | None:
    """Return the network of an address, None if it has none.

    Base58 addresses of test networks do not distinguish testnet and regtest, so their bech32 prefix is unknown.
    """
    for prefix in SEGWIT_PREFIXES:
        if address.startswith(f"{prefix}1"):
            return MAIN if prefix == MAIN.segwit else Network(prefix, *_TEST_VERSIONS)
    return MAIN if address[:1] in {"1", "3"} else Network(None, *_TEST_VERSIONS) if address[:1] in set("mn2") else None


def address_of(script: str, network: Network) -> str | None:
    """Return the address of a scriptPubKey in hex; None if it has none (bare keys, bare multisig, data, unknown)."""
    match = _SEGWIT.fullmatch(script)
    if match is not None and len(match["program"]) == 2 * int(match["length"], 16):
        opcode = int(match["version"], 16)
        program = bytes.fromhex(match["program"])
        version = opcode - 0x50 if opcode else 0
        if network.segwit is None or (version == 0 and len(program) not in (20, 32)):
            return None
        return segwit_address(network.segwit, version, program)
    for pattern, base58_version in ((_PUBKEY_HASH, network.pubkey_hash), (_SCRIPT_HASH, network.script_hash)):
        match = pattern.fullmatch(script)
        if match is not None:
            return base58check(base58_version, bytes.fromhex(match[1]))
    return None


_SEGWIT = re.compile("(?P<version>00|5[1-9a-f]|60)(?P<length>0[2-9a-f]|1[0-9a-f]|2[0-8])(?P<program>[0-9a-f]*)")
_PUBKEY_HASH = re.compile("76a914([0-9a-f]{40})88ac")
_SCRIPT_HASH = re.compile("a914([0-9a-f]{40})87")


def segwit_address(prefix: str, version: int, program: bytes) -> str:
    """Return the address of a witness program: bech32 for version 0 (BIP 173), bech32m above (BIP 350)."""
    bits = "".join(f"{byte:08b}" for byte in program)
    bits += "0" * (-len(bits) % 5)
    data = [version, *(int(bits[start : start + 5], 2) for start in range(0, len(bits), 5))]
    rest = polymod(expanded(prefix) + data + [0] * 6) ^ (BECH32_REST if version == 0 else BECH32M_REST)
    checksum = [rest >> 5 * (5 - place) & 31 for place in range(6)]
    return f"{prefix}1" + "".join(BECH32[value] for value in data + checksum)


def base58check(version: int, payload: bytes) -> str:
    """Return the Base58Check encoding of a version byte and a payload."""
    raw = bytes([version]) + payload
    raw += sha256(sha256(raw).digest()).digest()[:4]
    number, letters = int.from_bytes(raw), ""
    while number:
        number, digit = divmod(number, 58)
        letters = BASE58[digit] + letters
    return BASE58[0] * (len(raw) - len(raw.lstrip(b"\0"))) + letters


def expanded(prefix: str) -> list[int]:
    """Return a prefix in the expanded form that enters the checksum of bech32."""
    return [ord(letter) >> 5 for letter in prefix] + [0] + [ord(letter) & 31 for letter in prefix]


def polymod(values: Iterable[int], rest: int = 1) -> int:
    """Return the checksum polynomial of bech32 (BIP 173). `rest` is the result for the preceding values."""
    for value in values:
        rest = (rest & 0x1FFFFFF) << 5 ^ value ^ _STEPS[rest >> 25]
    return rest


# --- validation ---


def _values(alphabet: str) -> bytes:
    """Return the table for `bytes.translate` that maps each character to its value in an alphabet."""
    return bytes(alphabet.find(chr(code)) % 256 for code in range(256))


_BECH32_VALUES = _values(BECH32)
_BASE58_VALUES = _values(BASE58)
_PREFIX_RESTS = {prefix: polymod(expanded(prefix)) for prefix in SEGWIT_PREFIXES}
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
    if polymod(values, _PREFIX_RESTS[prefix]) != (BECH32_REST if version == 0 else BECH32M_REST):
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
