"""The limits of a credential beside its permissions: the networks to connect from, and its fixed filter.

Pure.
"""

import ipaddress
from dataclasses import replace

import msgspec

from whaled.errors import ClientError, ClientErrorCode, TokenError, TokenRefusal
from whaled.model import Grant
from whaled.whales.filters import EVERYTHING, Filter, parse_filter

# A fixed filter is read at each authentication, which takes 0.3 ms for this many addresses.
MAX_FIXED_ADDRESSES = 1_000
# Networks are compared one by one at each authentication, at about 5 us each.
MAX_NETWORKS = 64
# An IPv4 address as the socket of `::` reports it.
_MAPPED = "::ffff:"


def fixed_filter(text: str) -> Filter:
    """Return the filter in the JSON text of a grant. Raises ClientError with code invalid_filter."""
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ClientError(ClientErrorCode.INVALID_FILTER, f"the filter is not JSON: {error}") from None
    return parse_filter(raw, max_addresses=MAX_FIXED_ADDRESSES)


def judge(grant: Grant, address: str) -> Filter:
    """Return what the client receives without a filter of its own. Raises TokenError if it may not connect from here.

    A network or a filter that cannot be read permits nothing.
    """
    if grant.networks and not _is_within(grant.networks, address):
        detail = f"{address} is in none of {', '.join(grant.networks)}"
        raise TokenError(TokenRefusal.WRONG_NETWORK, detail, claimant=_claimant(grant), client_id=grant.client_id)
    if grant.fixed_filter is None:
        return EVERYTHING
    try:
        return Filter(within=fixed_filter(grant.fixed_filter))
    except ClientError as error:
        raise TokenError(
            TokenRefusal.BAD_CLAIMS, str(error), claimant=_claimant(grant), client_id=grant.client_id
        ) from None


def narrowed(chosen: Filter, base: Filter) -> Filter:
    """Return the filter of a client within the one that `judge` returned."""
    return chosen if base.within is None else replace(chosen, within=base.within)


def _is_within(networks: tuple[str, ...], address: str) -> bool:
    """Return whether an address is in one of these CIDR blocks; never for a Unix socket, which has no address."""
    try:
        found = ipaddress.ip_address(address.removeprefix(_MAPPED) if "." in address else address)
        return any(found in ipaddress.ip_network(network) for network in networks)
    except ValueError:
        return False


def _claimant(grant: Grant) -> str:
    return grant.token_id or ""
