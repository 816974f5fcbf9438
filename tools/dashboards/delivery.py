"""Delivery to clients: connections, refusals, traffic and latency, for the analysis of a client's complaint."""

from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import units

from tools.dashboards.frame import Row
from tools.dashboards.frame import dashboard as framed
from tools.dashboards.kit import BLUE, GREEN, RED, YELLOW, buckets, lines, number, of, quantile, rate


def _summary() -> Row:
    recovered = """sum(increase({}[$__range]))"""
    return "Are clients served?", [
        number(
            "Clients of limit",
            "Open connections, as a share of gateway.max_connections. Raise it, and LimitNOFILE, before it is reached.",
            f"max({of('whaled_connections')} / {of('whaled_connections_limit')})",
            units.PercentUnit,
            ((None, GREEN), (0.8, YELLOW), (0.95, RED)),
            trend=True,
            decimals=1,
            width=4,
        ),
        number(
            "Frame to client, p99",
            "Time from the receipt of the backend's frame to the last write to a live client, 99th percentile of the "
            "frames with a whale.",
            quantile(0.99, "whaled_frame_to_sent_seconds"),
            units.Seconds,
            ((None, GREEN), (0.5, YELLOW), (1, RED)),
            trend=True,
            width=4,
        ),
        number(
            "Canary, p99",
            "Time from a canary's frame to its arrival, 99th percentile. Objective: 99.5 % within 1 s over 30 days.",
            quantile(0.99, "whaled_canary_seconds"),
            units.Seconds,
            ((None, GREEN), (0.5, YELLOW), (1, RED)),
            trend=True,
            width=4,
        ),
        number(
            "Queued for clients",
            "Unsent bytes of all clients, which are held in memory. If they are high, clients or the uplink are slow.",
            f"sum({of('whaled_unsent_bytes')})",
            units.BytesIEC,
            ((None, GREEN), (64 * 2**20, YELLOW), (256 * 2**20, RED)),
            trend=True,
            width=4,
        ),
        number(
            "Not recovered",
            "Replays in the displayed range whose position was older than the log. These clients missed events and "
            "were notified of it.",
            recovered.format(of("whaled_replays_total", 'recovered="false"')),
            units.Short,
            ((None, GREEN), (0.5, YELLOW), (10, RED)),
            decimals=0,
            width=4,
        ),
        number(
            "Shed",
            "Sessions closed in the displayed range to save memory. Raise MemoryMax, or lower gateway.max_connections "
            "or gateway.max_unsent.",
            recovered.format(of("whaled_connections_shed_total")),
            units.Short,
            ((None, GREEN), (0.5, RED)),
            decimals=0,
            width=4,
        ),
    ]


def _connections() -> Row:
    return "Connections", [
        lines(
            "Connections",
            "Open connections, and those of them that are unauthenticated. If many stay unauthenticated, someone is "
            "holding connections open.",
            units.Short,
            {
                "open": f"sum({of('whaled_connections')})",
                "live": f"sum({of('whaled_clients_live')})",
                "replaying": f"sum({of('whaled_clients_replaying')})",
                "not authenticated": f"sum({of('whaled_connections_unauthenticated')})",
            },
            width=12,
        ),
        lines(
            "Opened, refused, closed",
            "Opened sessions, refused connections, and closed sessions. If far more are opened than there are clients, "
            "clients reconnect in a loop.",
            units.CountsPerSecond,
            {
                "opened": rate("whaled_connections_opened_total"),
                "refused": rate("whaled_connections_refused_total"),
                "closed": rate("whaled_connections_closed_total"),
                "shed": rate("whaled_connections_shed_total"),
            },
            width=12,
        ),
        lines(
            "Refused by reason",
            "Connections that did not become a session, by the limit or fault that is the reason.",
            units.CountsPerSecond,
            {"{{reason}}": rate("whaled_connections_refused_total", by="reason")},
            many=True,
            width=12,
        ),
        lines(
            "Closed by code",
            "Closed sessions by close code. 1008: credentials or rate limit; 1011: a bug, see the journal; 1012: a "
            "restart; 1013: slow clients or memory; 1005 and 1006: the client disconnected without a close code.",
            units.CountsPerSecond,
            {"{{code}}": rate("whaled_connections_closed_total", by="code")},
            many=True,
            width=12,
        ),
        lines(
            "Authentications by outcome",
            "unknown_key, bad_signature: a key was retired too early, or someone is guessing tokens. expired: a client "
            "does not refresh its token.",
            units.CountsPerSecond,
            {"{{outcome}}": rate("whaled_authentications_total", by="outcome")},
            many=True,
            width=12,
        ),
        lines(
            "Messages rejected",
            "Client messages that got an error, by its code. rate_limited: a client sends too many messages, or "
            "gateway.messages_per_second is too low.",
            units.MessagesPerSecond,
            {"{{code}}": rate("whaled_messages_rejected_total", by="code")},
            many=True,
            width=12,
        ),
    ]


def _traffic() -> Row:
    return "Traffic", [
        lines(
            "Messages in",
            "Messages from clients by type. If invalid grows, a client is faulty.",
            units.MessagesPerSecond,
            {"{{type}}": rate("whaled_messages_received_total", by="type")},
            stacked=True,
        ),
        lines(
            "Messages out",
            "Frames sent to all clients by type. control: responses and notices to a single client.",
            units.MessagesPerSecond,
            {"{{type}}": rate("whaled_messages_sent_total", by="type")},
            stacked=True,
        ),
        lines(
            "Bytes",
            "Bytes of messages to and from clients. Compare with the uplink.",
            units.BytesPerSecondIEC,
            {"out": rate("whaled_sent_bytes_total"), "in": rate("whaled_received_bytes_total")},
        ),
        lines(
            "Published",
            "Events and alerts passed to the hub. If they stay below the committed events, there is a bug.",
            units.EventsPerSecond,
            {
                "events committed": rate("whaled_eventlog_events_total"),
                "events published": rate("whaled_events_published_total"),
                "alerts published": rate("whaled_alerts_published_total"),
            },
        ),
        lines(
            "Filters in use",
            "Distinct filters. Each is evaluated once per event for all clients that share it.",
            units.Short,
            {"{{instance}}": of("whaled_filters")},
        ),
        lines(
            "Memory shedding",
            "1 while whaled refuses new clients and closes slow ones to save memory.",
            units.Short,
            {"{{instance}}": of("whaled_memory_shedding")},
            limit=1,
        ),
    ]


def _slow() -> Row:
    return "Slow and returning clients", [
        lines(
            "Queued for clients",
            "Unsent bytes of all clients.",
            units.BytesIEC,
            {"{{instance}}": of("whaled_unsent_bytes")},
        ),
        lines(
            "Falling behind",
            "Clients that fell behind and were switched to replay, without loss of events, and clients closed as too "
            "slow (1013).",
            units.CountsPerSecond,
            {
                "lagged": rate("whaled_clients_lagged_total"),
                "closed 1013": rate("whaled_connections_closed_total", 'code="1013"'),
            },
        ),
        lines(
            "Replays",
            "Replays from the log, by whether the position was honoured. Not recovered: the client was disconnected "
            "longer than eventlog.retention, or the log was restored.",
            units.CountsPerSecond,
            {
                "recovered": rate("whaled_replays_total", 'recovered="true"'),
                "not recovered": rate("whaled_replays_total", 'recovered="false"'),
            },
            colors={"recovered": BLUE, "not recovered": RED},
        ),
        lines(
            "Replayed and live",
            "Event frames from replays, and all event frames. If most are replayed for a long time, clients are slower "
            "than the stream of events.",
            units.MessagesPerSecond,
            {
                "out of the log": rate("whaled_messages_replayed_total"),
                "all events": rate("whaled_messages_sent_total", 'type=~"whale_alert|whale_update"'),
            },
        ),
        lines(
            "Rate limited",
            "Messages, authentications and connections above the limit of a client or an address.",
            units.CountsPerSecond,
            {
                "messages": rate("whaled_messages_rejected_total", 'code="rate_limited"'),
                "authentications": rate("whaled_authentications_total", 'outcome="rate_limited"'),
                "connections": rate("whaled_connections_refused_total", 'reason="address_cap"'),
            },
        ),
        lines(
            "Retained positions",
            "The newest committed offset and the oldest retained one. Between them a client can resume without loss.",
            units.Short,
            {
                "newest {{instance}}": of("whaled_eventlog_head_offset"),
                "oldest {{instance}}": of("whaled_eventlog_oldest_offset"),
            },
            floating=True,
        ),
    ]


def _latency() -> Row:
    return "Latency", [
        buckets(
            "Frame to client",
            "Time from the receipt of the backend's frame to the last write to a live client, for frames with a whale.",
            "whaled_frame_to_sent_seconds",
        ),
        lines(
            "Frame to commit and to client",
            "Time from the receipt of the backend's frame to the commit of its events, and to the last write to a live "
            "client. The difference is the fan-out.",
            units.Seconds,
            {
                f"{text} p{share * 100:g}": quantile(share, metric)
                for text, metric in (
                    ("committed", "whaled_frame_to_commit_seconds"),
                    ("sent", "whaled_frame_to_sent_seconds"),
                )
                for share in (0.5, 0.9, 0.99)
            },
            logarithmic=True,
            width=12,
        ),
        lines(
            "Canaries",
            "Time from a canary's frame to its arrival. Dashed: the objective for 99.5 % of them.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_canary_seconds") for share in (0.5, 0.9, 0.99)},
            steps=((None, "transparent"), (1, RED)),
            logarithmic=True,
            width=12,
        ),
        lines(
            "Canaries started and failed",
            "Started canaries, one every canary.interval, and those that did not arrive in time (late) or failed in "
            "the pipeline (error).",
            units.CountsPerSecond,
            {
                "started": rate("whaled_canaries_sent_total"),
                "failed: {{reason}}": rate("whaled_canaries_failed_total", by="reason"),
            },
            width=12,
        ),
    ]


def dashboard() -> model.Dashboard:
    """Build the dashboard."""
    return framed(
        "whaled-delivery",
        "delivery",
        "Connections, refusals, traffic, replays and latency of clients.",
        [_summary(), _connections(), _traffic(), _slow(), _latency()],
    )
