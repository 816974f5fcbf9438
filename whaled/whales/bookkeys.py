"""The keys of an address book: an address, or the public key or script of an output without an address. Pure.

Outputs that pay a bare public key (P2PK) have no address, nor do bare multisig and other scripts. A public key in the
book matches the outputs that pay it directly, in its compressed and its uncompressed form.
"""

import re
from collections.abc import Mapping
from enum import IntEnum

from whaled import addresses

# The order of the field of secp256k1 (SEC 2): the curve is y^2 = x^3 + 7 modulo this number.
FIELD = 2**256 - 2**32 - 977
# Size limit for scripts in the book. A bare multisig of three uncompressed keys has 201 bytes.
MAX_SCRIPT_BYTES = 400
_HEX = re.compile("[0-9a-fA-F]{4,}")
_COMPRESSED = re.compile("0[23][0-9a-f]{64}")
_UNCOMPRESSED = re.compile("04[0-9a-f]{128}")
OP_PUSHDATA1, OP_PUSHDATA4 = 0x4C, 0x4E


class Network(IntEnum):
    """The network on which a key of the book occurs. Base58 does not distinguish testnet, signet and regtest."""

    MAINNET = 0
    TESTNET = 1
    REGTEST = 2
    ANY_TEST = 3
    SCRIPT = 4

    @property
    def title(self) -> str:
        """The name of the network in texts for the operator."""
        return ("mainnet", "testnet or signet", "regtest", "a test network", "scripts and public keys")[self]


_SEGWIT = ("bc1", "tb1", "bcrt1")
_SEGWIT_STARTS = {"bc1": Network.MAINNET, "tb1": Network.TESTNET, "bcr": Network.REGTEST}


def fault_in(key: str) -> str | None:
    """Return the fault in an address, public key or script, None if it is valid. The text names the assumed kind."""
    problem = addresses.fault_in(key)
    if problem is None:
        return None
    if _HEX.fullmatch(key) is None or key.startswith("0x"):
        return f"address {key[:100]!r} {problem}"
    what = "public key" if _looks_like_key(key) else "script"
    problem = _fault_in_hex(key.lower())
    return f"{what} {key[:100]!r} {problem}" if problem is not None else None


def canonical(key: str) -> tuple[str, Network]:
    """Return the form of a key that `of_script` and a backend use, and its network. The key must be valid."""
    lower = key.lower()
    found = _SEGWIT_STARTS.get(lower[:3])
    if found is not None and lower.startswith(_SEGWIT):
        return lower, found
    if not _is_hex(key):
        return key, Network.MAINNET if key[0] in "13" else Network.ANY_TEST
    if _UNCOMPRESSED.fullmatch(lower):
        return _compressed(lower), Network.SCRIPT
    return lower if _COMPRESSED.fullmatch(lower) else of_script(lower), Network.SCRIPT


def elsewhere(counts: Mapping[Network, int], backend: str) -> dict[str, int]:
    """Return the number of keys that cannot occur on a backend's network, by the title of their own network.

    `backend` is the name that `upstream.identity` gives its network. A simulated network has the addresses of the one
    that it simulates. Empty for a backend on an unknown network.
    """
    backend = backend.removeprefix("simulated ")
    if backend == "mainnet":
        here = {Network.MAINNET}
    elif backend == "regtest":
        here = {Network.REGTEST, Network.ANY_TEST}
    elif backend.startswith(("testnet", "signet", "a signet")):
        here = {Network.TESTNET, Network.ANY_TEST}
    else:
        return {}
    here.add(Network.SCRIPT)
    return {network.title: count for network, count in counts.items() if count and network not in here}


def of_script(script: str) -> str:
    """Return the key of the book that matches a scriptPubKey (hex, lower case)."""
    if script.endswith("ac"):
        if len(script) == 70 and script.startswith(("2102", "2103")):
            return script[2:-2]
        if len(script) == 134 and script.startswith("4104"):
            return _compressed(script[2:-2])
    return script


def _is_hex(key: str) -> bool:
    """Return whether a key is hex and not an address. By chance, a base58 address may consist of hex digits only."""
    return _HEX.fullmatch(key) is not None and not (26 <= len(key) <= 35 and addresses.fault_in(key) is None)


def _compressed(uncompressed: str) -> str:
    return ("03" if int(uncompressed[-1], 16) % 2 else "02") + uncompressed[2:66]


def _looks_like_key(key: str) -> bool:
    return (len(key) == 66 and key.startswith(("02", "03"))) or (len(key) == 130 and key.startswith("04"))


def _fault_in_hex(text: str) -> str | None:
    if len(text) % 2:
        return "has an odd number of hex digits"
    if _looks_like_key(text):
        return None if _is_point(text) else "is not a point of the curve: a character is mistyped"
    if len(text) == 64:
        return (
            "is 32 bytes: a transaction id, a hash or an x-only key; expected an address, a public key of 33 or 65 "
            "bytes or a scriptPubKey"
        )
    if len(text) == 40:
        return "is a hash of 20 bytes; expected the address that it makes"
    if len(text) > 2 * MAX_SCRIPT_BYTES:
        return f"has more than {MAX_SCRIPT_BYTES} bytes"
    if not _is_whole(bytes.fromhex(text)):
        return "is not a complete scriptPubKey, and no public key of 33 bytes (02, 03) or 65 bytes (04)"
    key = of_script(text)
    if key != text and not _is_point(text[2:-2]):
        return "has a public key that is not a point of the curve: a character is mistyped"
    return None


def _is_point(key: str) -> bool:
    """Return whether a public key is a point of secp256k1.

    A mistyped key is not a point in half of the cases if it is compressed, in practically all if it is uncompressed.
    """
    x = int(key[2:66], 16)
    square = (pow(x, 3, FIELD) + 7) % FIELD
    if x >= FIELD:
        return False
    if key.startswith("04"):
        return pow(int(key[66:], 16), 2, FIELD) == square
    return pow(square, (FIELD - 1) // 2, FIELD) == 1


def _is_whole(script: bytes) -> bool:
    """Return whether each push of a script has all the bytes that it announces."""
    at = 0
    while at < len(script):
        opcode = script[at]
        at += 1
        if opcode < OP_PUSHDATA1:
            at += opcode
        elif opcode <= OP_PUSHDATA4:
            size = 1 << (opcode - OP_PUSHDATA1)
            at += size + int.from_bytes(script[at : at + size], "little")
    return at == len(script)
