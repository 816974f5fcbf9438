"""The lines of `whaled tail` on a terminal: one per event, fitted to the width. Pure."""

from collections.abc import Sequence
from datetime import datetime, tzinfo

from msgspec import Struct
from rich.text import Text

from whaled.client import Missed, Position, TokenRenewed, UpstreamStatus, WhaleAlert, WhaleUpdate

# (minimum BTC, style)
SIZES = ((10_000.0, "bold red"), (1_000.0, "bold yellow"), (500.0, "yellow"), (0.0, "cyan"))
OUTCOMES = {"confirmed": "green", "replaced": "magenta", "dropped": "red", "pending": "yellow"}
STATUS_WIDTH = max(map(len, OUTCOMES))
UNKNOWN = "-"
URGENCY_STEPS = 5
TXID_FULL = 64
TXID_SHORT = 17


class Column(Struct, frozen=True):
    """A column of fixed width. On a narrow terminal, columns with the highest `spare` are removed first, 0 never."""

    name: str
    title: str
    width: int
    is_right: bool = False
    spare: int = 0


COLUMNS = (
    Column("time", "time", 11),
    Column("btc", "BTC", 13, is_right=True),
    Column("usd", "USD", 8, is_right=True, spare=4),
    Column("rate", "sat/vB", 7, is_right=True, spare=5),
    Column("urgency", "urgency", 7, spare=2),
    Column("flow", "flow", 8, spare=1),
    Column("shape", "shape", 13, spare=6),
    Column("block", "block", 9, is_right=True, spare=3),
)


class Layout(Struct, frozen=True):
    """The columns that fit, and the width of a txid. `is_ascii` if the terminal lacks block characters."""

    columns: tuple[Column, ...]
    txid_width: int
    is_ascii: bool = False

    @property
    def columns_width(self) -> int:
        """Return the width of everything before the txid."""
        return sum(column.width + 1 for column in self.columns)


def layout(width: int, *, is_ascii: bool = False) -> Layout:
    """Fit the columns to the width of a terminal. The txid is complete if there is space left for it."""
    columns = list(COLUMNS)
    while sum(column.width + 1 for column in columns) + TXID_SHORT > width:
        spare = max(columns, key=lambda column: column.spare)
        if not spare.spare:
            break
        columns.remove(spare)
    room = width - sum(column.width + 1 for column in columns)
    return Layout(tuple(columns), TXID_FULL if room >= TXID_FULL else TXID_SHORT, is_ascii)


def header(fit: Layout) -> Text:
    """Return the line of column titles."""
    return Text(_cells(fit.columns, {column.name: column.title for column in fit.columns}) + " txid", style="dim")


def alert_line(event: WhaleAlert, fit: Layout, now: datetime) -> Text:
    """Return the line of an alert. `now` is local time: events of another day show their date."""
    data = event.data
    block = data.predicted_confirmation_block
    # A whale that was already in a block when whaled first saw it.
    unknown = "mined" if data.status == "confirmed" else UNKNOWN
    values = {
        "time": clock(event.timestamp, now),
        "btc": f"{data.btc_value:,.2f}",
        "usd": dollars(data.usd_value),
        "rate": UNKNOWN if data.fee_rate is None else f"{data.fee_rate:.1f}",
        "urgency": bar(data.urgency_score, is_ascii=fit.is_ascii),
        "flow": data.flow_type,
        "shape": data.shape,
        "block": unknown if block is None else f"{block:,}",
    }
    style = next(style for least, style in SIZES if data.btc_value >= least or not least)
    return _line(fit, _cells(fit.columns, values), data.transaction_id, style)


def update_line(event: WhaleUpdate, fit: Layout, now: datetime) -> Text:
    """Return the line of an update: the amount in the column of the alerts' amounts, then the outcome."""
    data = event.data
    values = {
        "time": clock(event.timestamp, now),
        "btc": UNKNOWN if data.btc_value is None else f"{data.btc_value:,.2f}",
    }
    start = _cells([column for column in fit.columns if column.name in values], values)
    room = max(STATUS_WIDTH, fit.columns_width - len(start) - 2)
    text = f"{start} {outcome(event, room, is_ascii=fit.is_ascii)[:room]:{room}}"
    return _line(fit, text, data.transaction_id, OUTCOMES.get(data.status, "dim"))


def outcome(event: WhaleUpdate, room: int, *, is_ascii: bool = False) -> str:
    """Describe an outcome. The least important parts are left out if it is longer than `room` characters."""
    data = event.data
    parts = [data.status]
    if data.block_height is not None:
        parts.append(f"in block {data.block_height:,}")
    if data.replaced_by is not None:
        parts.append(f"by {short(data.replaced_by, is_ascii=is_ascii)}")
    if data.seconds_to_confirmation is not None:
        parts.append(f"after {duration(data.seconds_to_confirmation)}")
    if data.blocks_off:
        plural = "s" if abs(data.blocks_off) > 1 else ""
        parts.append(f"({abs(data.blocks_off)} block{plural} {'late' if data.blocks_off > 0 else 'early'})")
    while len(parts) > 1 and len(" ".join(parts)) > room:
        parts.pop()
    return clean(" ".join(parts))


def missed_line(event: Missed) -> str:
    """Describe a gap."""
    since = at(event.since) if isinstance(event.since, Position) else "the requested start"
    held = f"; the oldest it has is {at(event.oldest)}" if event.oldest is not None else ""
    live = f"live from {at(event.position)}"
    return f"events may be missing: the server no longer has all events since {since}{held}; {live}"


def upstream_line(event: UpstreamStatus) -> str:
    """Describe the state of the server's link to its backend."""
    since = f" since {_local(event.since):%H:%M:%S}" if event.since is not None else ""
    return f"mempool backend {clean(event.state)}{since}"


def renewed_line(event: TokenRenewed) -> str:
    """Describe a renewed token. `whaled tail` does not save it: it never writes the user's token file."""
    until = f" until {event.expires_at.isoformat()}" if event.expires_at is not None else ""
    return f"the server renewed the token{until}, for this run only: the next one needs a new token"


def at(position: Position) -> str:
    """Return a position in the form that --since accepts."""
    return f"{clean(position.epoch)}:{position.offset}"


# --- cells ------------------------------------------------------------------------------------------------------------


def clock(moment: datetime, now: datetime) -> str:
    """Return the local time of day, or date and time if it is another day."""
    local = _local(moment, now.tzinfo)
    return f"{local:%H:%M:%S}" if local.date() == now.date() else f"{local:%m-%d %H:%M}"


def _local(moment: datetime, zone: tzinfo | None = None) -> datetime:
    """Convert to local time or `zone`. A time at the end of the calendar, which a server may send, stays unchanged."""
    try:
        return moment.astimezone(zone)
    except OverflowError:
        return moment


def dollars(value: float | None) -> str:
    """Return an amount of USD in at most eight characters."""
    if value is None:
        return UNKNOWN
    for least, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= least * 0.9995:
            return f"${value / least:,.1f}{unit}"
    return f"${value:,.0f}"


def bar(part: float | None, *, is_ascii: bool = False) -> str:
    """Return a number from 0 to 1 as a bar."""
    if part is None:
        return UNKNOWN
    filled = min(URGENCY_STEPS, max(0, round(part * URGENCY_STEPS)))
    full, empty = ("#", ".") if is_ascii else ("\u25a0", "\u00b7")
    return full * filled + empty * (URGENCY_STEPS - filled)


def duration(seconds: float) -> str:
    """Return a duration in its one or two largest units."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"


def short(txid: str, *, is_ascii: bool = False) -> str:
    """Return the first and last eight characters of a txid."""
    text = clean(txid)
    return text if len(text) <= TXID_SHORT else f"{text[:8]}{'~' if is_ascii else chr(0x2026)}{text[-8:]}"


def clean(text: str) -> str:
    """Replace control characters: text from a server must not control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _cells(columns: Sequence[Column], values: dict[str, str]) -> str:
    cells = (
        f"{clean(values[column.name])[: column.width]:{'>' if column.is_right else '<'}{column.width}}"
        for column in columns
    )
    return " ".join(cells)


def _line(fit: Layout, text: str, txid: str, style: str) -> Text:
    shown = clean(txid) if fit.txid_width == TXID_FULL else short(txid, is_ascii=fit.is_ascii)
    return Text.assemble((text, style), " ", (shown, "dim"))
