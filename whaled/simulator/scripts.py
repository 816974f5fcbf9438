"""Output scripts of every type that a backend distinguishes, with their addresses, and the inputs that spend them.

Addresses are well-formed (checksum, prefix, length). Their keys are random bytes that belong to no one.
"""

from collections.abc import Callable
from enum import StrEnum
from hashlib import shake_128
from random import Random

from msgspec import Struct

from whaled.addresses import base58check, segwit_address


class Network(StrEnum):
    """The network, which determines address prefixes, difficulty, and whether there is a price."""

    MAINNET = "mainnet"
    REGTEST = "regtest"


class ScriptType(StrEnum):
    """`scriptpubkey_type` as a backend writes it."""

    P2PK = "p2pk"
    P2PKH = "p2pkh"
    P2SH = "p2sh"
    P2WPKH = "v0_p2wpkh"
    P2WSH = "v0_p2wsh"
    P2TR = "v1_p2tr"
    OP_RETURN = "op_return"
    MULTISIG = "multisig"
    ANCHOR = "anchor"
    NONSTANDARD = "nonstandard"
    UNKNOWN = "unknown"


class Script(Struct, frozen=True, gc=False):
    """A scriptPubKey: hex, address (empty if there is none), assembly text, type."""

    hex: str
    address: str
    asm: str
    type: ScriptType


class Spend(Struct, frozen=True, gc=False):
    """The signature data of an input: scriptSig in hex and assembly, and witness items in hex."""

    scriptsig: str
    scriptsig_asm: str
    witness: tuple[str, ...]


class SpendSize(Struct, frozen=True, gc=False):
    """The sizes of a spend in bytes: the scriptSig, and the serialised witness stack (0 if there is none)."""

    scriptsig: int
    witness: int


SPENDABLE = {
    ScriptType.P2PK: SpendSize(72, 0),
    ScriptType.P2PKH: SpendSize(106, 0),
    ScriptType.P2SH: SpendSize(23, 107),
    ScriptType.P2WPKH: SpendSize(0, 107),
    ScriptType.P2WSH: SpendSize(0, 252),
    ScriptType.P2TR: SpendSize(0, 66),
    ScriptType.MULTISIG: SpendSize(73, 0),
}


class Scripts:
    """A factory of random scripts for one network."""

    def __init__(self, network: Network, rng: Random) -> None:
        self._rng = rng
        mainnet = network is Network.MAINNET
        self._prefix = "bc" if mainnet else "bcrt"
        self._key_version, self._script_version = (0x00, 0x05) if mainnet else (0x6F, 0xC4)
        self._makers: dict[ScriptType, Callable[[], Script]] = {
            ScriptType.P2PK: self._p2pk,
            ScriptType.P2PKH: self._p2pkh,
            ScriptType.P2SH: self._p2sh,
            ScriptType.P2WPKH: lambda: self._witness(0, self._rng.randbytes(20), ScriptType.P2WPKH),
            ScriptType.P2WSH: lambda: self._witness(0, self._rng.randbytes(32), ScriptType.P2WSH),
            ScriptType.P2TR: lambda: self._witness(1, self._rng.randbytes(32), ScriptType.P2TR),
            ScriptType.OP_RETURN: self._op_return,
            ScriptType.MULTISIG: self._multisig,
            ScriptType.ANCHOR: lambda: self._witness(1, bytes.fromhex("4e73"), ScriptType.ANCHOR),
            ScriptType.NONSTANDARD: self._hash_puzzle,
            ScriptType.UNKNOWN: lambda: self._witness(2, self._rng.randbytes(32), ScriptType.UNKNOWN),
        }

    def make(self, kind: ScriptType) -> Script:
        """Return a new script of a type (an anchor is always the same)."""
        return self._makers[kind]()

    def _pubkey(self) -> str:
        return self._rng.choice(("02", "03")) + self._rng.randbytes(32).hex()

    def _p2pk(self) -> Script:
        key = self._pubkey()
        return Script(f"21{key}ac", "", f"OP_PUSHBYTES_33 {key} OP_CHECKSIG", ScriptType.P2PK)

    def _p2pkh(self) -> Script:
        digest = self._rng.randbytes(20)
        asm = f"OP_DUP OP_HASH160 OP_PUSHBYTES_20 {digest.hex()} OP_EQUALVERIFY OP_CHECKSIG"
        address = base58check(self._key_version, digest)
        return Script(f"76a914{digest.hex()}88ac", address, asm, ScriptType.P2PKH)

    def _p2sh(self) -> Script:
        digest = self._rng.randbytes(20)
        asm = f"OP_HASH160 OP_PUSHBYTES_20 {digest.hex()} OP_EQUAL"
        return Script(f"a914{digest.hex()}87", base58check(self._script_version, digest), asm, ScriptType.P2SH)

    def _witness(self, version: int, program: bytes, kind: ScriptType) -> Script:
        opcode = f"{0x50 + version:02x}" if version else "00"
        name = f"OP_PUSHNUM_{version}" if version else "OP_0"
        return Script(
            f"{opcode}{len(program):02x}{program.hex()}",
            segwit_address(self._prefix, version, program),
            f"{name} OP_PUSHBYTES_{len(program)} {program.hex()}",
            kind,
        )

    def _op_return(self) -> Script:
        data = self._rng.randbytes(self._rng.randint(4, 75)).hex()
        size = len(data) // 2
        return Script(f"6a{size:02x}{data}", "", f"OP_RETURN OP_PUSHBYTES_{size} {data}", ScriptType.OP_RETURN)

    def _multisig(self) -> Script:
        first, second = self._pubkey(), self._pubkey()
        asm = f"OP_PUSHNUM_1 OP_PUSHBYTES_33 {first} OP_PUSHBYTES_33 {second} OP_PUSHNUM_2 OP_CHECKMULTISIG"
        return Script(f"5121{first}21{second}52ae", "", asm, ScriptType.MULTISIG)

    def _hash_puzzle(self) -> Script:
        digest = self._rng.randbytes(32).hex()
        return Script(f"a820{digest}87", "", f"OP_SHA256 OP_PUSHBYTES_32 {digest} OP_EQUAL", ScriptType.NONSTANDARD)


def spend(kind: ScriptType, salt: str) -> Spend:
    """Return signature data of the correct form and length for an input of a type, determined by the salt."""
    noise = shake_128(salt.encode()).hexdigest(120)
    first = f"30440220{noise[0:64]}0220{noise[64:128]}01"
    key = f"02{noise[128:192]}"
    match kind:
        case ScriptType.P2PK:
            return Spend(f"47{first}", f"OP_PUSHBYTES_71 {first}", ())
        case ScriptType.P2PKH:
            return Spend(f"47{first}21{key}", f"OP_PUSHBYTES_71 {first} OP_PUSHBYTES_33 {key}", ())
        case ScriptType.P2SH:
            redeem = f"0014{noise[192:232]}"
            return Spend(f"16{redeem}", f"OP_PUSHBYTES_22 {redeem}", (first, key))
        case ScriptType.P2WSH:
            second = f"30440220{noise[32:96]}0220{noise[96:160]}01"
            keys = "".join(f"2102{noise[start : start + 64]}" for start in (0, 64, 128))
            return Spend("", "", ("", first, second, f"52{keys}53ae"))
        case ScriptType.P2TR:
            return Spend("", "", (noise[0:128],))
        case ScriptType.MULTISIG:
            return Spend(f"0047{first}", f"OP_0 OP_PUSHBYTES_71 {first}", ())
        case _:
            return Spend("", "", (first, key))


def witness_script_asm(data: Spend) -> str:
    """Return the script of a P2WSH input in assembly: two of three keys."""
    script = data.witness[-1]
    keys = " ".join(f"OP_PUSHBYTES_33 {script[start : start + 66]}" for start in (4, 72, 140))
    return f"OP_PUSHNUM_2 {keys} OP_PUSHNUM_3 OP_CHECKMULTISIG"
