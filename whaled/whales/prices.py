"""The price of a bitcoin: the time it is of, and for how long it counts. Pure."""

from whaled.model import SAT_PER_BTC, Market, Price

# A backend's clock that is ahead of this machine's by minutes is normal. A time further ahead is not the price's.
AHEAD_LIMIT_S = 3600.0


def received(known: Price | None, usd: float | None, stated_at: float | None, received_at: float) -> Price | None:
    """The price that a message gives, None if it is unknown.

    The time of a price is the one that the backend states, and that of the receipt where it states none. A stated time
    that lies ahead is replaced by that of the first receipt: a price is never newer than its message, and the same one
    sent again (after a reconnect) does not become newer.
    """
    if usd is None:
        return None
    if stated_at is None:
        return Price(usd, received_at)
    if stated_at > received_at + AHEAD_LIMIT_S:
        return None
    if known is not None and (known.usd, known.stated_at) == (usd, stated_at):
        return known
    return Price(usd, min(stated_at, received_at), stated_at)


def usable(market: Market, now: float, max_age_s: float) -> Price | None:
    """The price if it is at most `max_age_s` old now, and that near to the moment the market is asked for."""
    price = market.price
    if price is None or abs(now - price.at) > max_age_s:
        return None
    # A block's time may be ahead of every clock by two hours; the block is of now then.
    if market.moment is not None and abs(min(market.moment, now) - price.at) > max_age_s:
        return None
    return price


def usd_of(value_sat: int, price: Price) -> float:
    """An amount in US dollars, to the cent."""
    return round(value_sat * price.usd / SAT_PER_BTC, 2)
