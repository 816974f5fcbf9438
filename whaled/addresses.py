"""Encoding of Bitcoin addresses: base58check, bech32 (BIP 173), bech32m (BIP 350), addresses of scripts. Pure."""

import re
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
