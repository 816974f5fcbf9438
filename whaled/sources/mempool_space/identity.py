"""The identity of a backend: its version, and its network by the hash of the genesis block. Pure."""

import re

from msgspec import Struct

# `track-mempool` came with 3.0: an older backend accepts the subscription and never sends a transaction.
MINIMUM_VERSION = (3, 0)
SIGNET = "00000008819873e925422c1ff0f99f7cc9bbb232af63a077a480a3633bee1ef6"
# Every signet has the same genesis block; block 1 distinguishes them.
PUBLIC_SIGNET_BLOCK_1 = "00000086d6b2636cb2a392d45edc4ec544a10024d30141c9adf4bfd9de533b53"
NETWORKS = {
    "000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f": "mainnet",
    "000000000933ea01ad0ee984209779baaec3ced90fa3f408719526f8d77f4943": "testnet3",
    "00000000da84f2bafbbc53dee25a72ae507ff4914b867c565be350b0da8bf043": "testnet4",
    "0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206": "regtest",
    "ce862c50e818f74b7f996fd9e8f0cda7638feb1f9bf49bb8702cb48c69bb8dae": "simulated mainnet",
    "3ff0a93a9b1f064168ef0e093cc6172563d08d49b9894cff3982fa4b2ec2f1c8": "simulated regtest",
}
LIQUID = {
    "1466275836220db2944ca059a3a10ef6fd2ea684b0688d2c379296888a206003": "Liquid",
    "a771da8e52ee6ad581ed1e9a99825e5b3b7992225534eaa2ae23244fe26ab1c1": "Liquid testnet",
}
_VERSION = re.compile(r"v?([0-9]{1,4})\.([0-9]{1,4})(?![0-9])")


class Network(Struct, frozen=True):
    """A chain, identified by its genesis block and, for a signet, by block 1 if that is known."""

    genesis: str
    block_1: str | None = None

    @property
    def is_liquid(self) -> bool:
        """True for a Liquid network, which hides amounts."""
        return self.genesis in LIQUID

    def same_as(self, other: "Network") -> bool:
        """Return whether both are the same network, as far as both are known."""
        return self.genesis == other.genesis and (
            self.block_1 is None or other.block_1 is None or self.block_1 == other.block_1
        )

    def __str__(self) -> str:
        if self.genesis == SIGNET:
            is_public = self.block_1 in {None, PUBLIC_SIGNET_BLOCK_1}
            return "signet" if is_public else f"a signet with block 1 {self.block_1}"
        return NETWORKS.get(self.genesis) or LIQUID.get(self.genesis) or f"a network with genesis block {self.genesis}"


def is_too_old(version: str) -> bool:
    """Return whether a version is below the minimum. An unreadable one is not: a fork may have its own numbering."""
    found = _VERSION.match(version)
    return found is not None and (int(found[1]), int(found[2])) < MINIMUM_VERSION
