"""The bits of `flags` as a backend sets them (`common.ts`). Spent outputs count only if the prevouts are filled."""

from whaled.simulator.scripts import ScriptType
from whaled.simulator.transactions import REPLACEABLE, Tx

RBF, NO_RBF = 1 << 0, 1 << 1
NONSTANDARD = 1 << 5
CPFP_PARENT, CPFP_CHILD, REPLACEMENT = 1 << 16, 1 << 17, 1 << 18
COINJOIN, CONSOLIDATION, BATCH = 1 << 32, 1 << 33, 1 << 34
SIGHASH_ALL, SIGHASH_DEFAULT = 1 << 40, 1 << 43
_VERSIONS = {1: 1 << 2, 2: 1 << 3, 3: 1 << 4}
_TYPES = {
    ScriptType.P2PK: 1 << 8,
    ScriptType.MULTISIG: 1 << 9,
    ScriptType.P2PKH: 1 << 10,
    ScriptType.P2SH: 1 << 11,
    ScriptType.P2WPKH: 1 << 12,
    ScriptType.P2WSH: 1 << 13,
    ScriptType.P2TR: 1 << 14,
    ScriptType.OP_RETURN: 1 << 24,
}
_OUTPUTS_ONLY = frozenset({ScriptType.OP_RETURN})
# The backend finds a signature in the witness without the prevout, but one in a scriptSig only in electrs's form.
_WITNESS_SIGNED = frozenset({ScriptType.P2WPKH, ScriptType.P2WSH, ScriptType.P2SH})
_UNSTANDARD_TYPES = frozenset({ScriptType.NONSTANDARD, ScriptType.UNKNOWN})
MANY = 5


def flags_of(tx: Tx, *, prevouts: bool) -> int:
    """Return the bits of a transaction without its relatives. Invalid public keys are not detected."""
    bits = (RBF if tx.sequence <= REPLACEABLE else NO_RBF) | _VERSIONS[tx.version]
    for payment in tx.outputs:
        bits |= _TYPES.get(payment.script.type, 0)
    for coin in tx.inputs:
        kind = coin.script.type
        if kind in _WITNESS_SIGNED or (prevouts and kind is not ScriptType.P2TR):
            bits |= SIGHASH_ALL
        if prevouts:
            bits |= _TYPES.get(kind, 0) | (SIGHASH_DEFAULT if kind is ScriptType.P2TR else 0)
    return bits | _heuristics(tx, prevouts=prevouts)


def _heuristics(tx: Tx, *, prevouts: bool) -> int:
    n_in, n_out = max(1, len(tx.inputs)), len(tx.outputs)
    bits = CONSOLIDATION if n_in >= MANY * n_out else 0
    bits |= BATCH if n_in * MANY <= n_out else 0
    if any(payment.script.type in _UNSTANDARD_TYPES for payment in tx.outputs) and not tx.is_coinbase:
        bits |= NONSTANDARD
    # Unknown values count as distinct.
    distinct = len({coin.value for coin in tx.inputs}) if prevouts else n_in
    distinct += len({payment.value for payment in tx.outputs})
    has_data = any(payment.script.type in _OUTPUTS_ONLY for payment in tx.outputs)
    if min(n_in, n_out) >= MANY and distinct * 2 <= n_in + n_out and not has_data and n_in < n_out * MANY:
        bits |= COINJOIN if not _reuses(tx, prevouts=prevouts) else 0
    return bits


def _reuses(tx: Tx, *, prevouts: bool) -> bool:
    paid = [payment.script.address for payment in tx.outputs if payment.script.address]
    spent = {coin.script.address for coin in tx.inputs} if prevouts else set()
    return len(set(paid)) < len(paid) or any(address in spent for address in paid)
