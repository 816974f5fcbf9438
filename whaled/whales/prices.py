"""The price of a bitcoin: the time at which it applied, and for how long it is usable. Pure."""

from whaled.model import SAT_PER_BTC, Market, Price

# A backend's clock may be minutes ahead of this machine's. A time further ahead cannot be that of the price.
AHEAD_LIMIT_S = 3600.0


def received(known: Price | None, usd: float | None, stated_at: float | None, received_at: float) -> Price | None:
    """Return the price in a message, None if it is unknown.

    The time of a price is the one that the backend states, or the time of receipt if it states none. A stated time in
    the future is replaced by the time of the first receipt: a price is never newer than its message, and the same price
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
    """Return the price if it is at most `max_age_s` old, and as close to `market.moment`; otherwise None."""
    price = market.price
    if price is None or abs(now - price.at) > max_age_s:
        return None
    # A block's time may be two hours ahead of every clock; such a block is taken as mined now.
    if market.moment is not None and abs(min(market.moment, now) - price.at) > max_age_s:
        return None
    return price


def usd_of(value_sat: int, price: Price) -> float:
    """Return an amount in US dollars, rounded to the cent."""
    return round(value_sat * price.usd / SAT_PER_BTC, 2)
