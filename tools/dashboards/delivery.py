"""Who connects, who is turned away, what goes in and out, and how fast: the view for a complaint of a client."""

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
            "Open connections of gateway.max_connections. Raise it, and LimitNOFILE, before it is met.",
            f"max({of('whaled_connections')} / {of('whaled_connections_limit')})",
            units.PercentUnit,
            ((None, GREEN), (0.8, YELLOW), (0.95, RED)),
            trend=True,
            decimals=1,
            width=4,
        ),
        number(
            "Frame to client, p99",
            "From the arrival of the backend's frame to the last write to a live client, for 99 of 100 frames with "
            "a whale.",
            quantile(0.99, "whaled_frame_to_sent_seconds"),
            units.Seconds,
            ((None, GREEN), (0.5, YELLOW), (1, RED)),
            trend=True,
            width=4,
        ),
        number(
            "Canary, p99",
            "From a canary's frame to its arrival, for 99 of 100. Objective: 99.5 % within 1 s over 30 days.",
            quantile(0.99, "whaled_canary_seconds"),
            units.Seconds,
            ((None, GREEN), (0.5, YELLOW), (1, RED)),
            trend=True,
            width=4,
        ),
        number(
            "Queued for clients",
            "Bytes written for clients that the kernel has not taken yet. It is memory; high: clients or the uplink "
            "are slow.",
            f"sum({of('whaled_unsent_bytes')})",
            units.BytesIEC,
            ((None, GREEN), (64 * 2**20, YELLOW), (256 * 2**20, RED)),
            trend=True,
            width=4,
        ),
        number(
            "Not recovered",
            "Replays in the range shown for which the log did not go back far enough: these clients missed events, "
            "and were told so.",
            recovered.format(of("whaled_replays_total", 'recovered="false"')),
            units.Short,
            ((None, GREEN), (0.5, YELLOW), (10, RED)),
            decimals=0,
            width=4,
        ),
        number(
            "Shed",
            "Sessions closed in the range shown to save memory. Raise MemoryMax, or lower gateway.max_connections "
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
            "Open connections; of them those not authenticated yet. Many of these and lasting: somebody holds "
            "connections open.",
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
            "Sessions opened, connections that did not become one, and sessions ended. Opened far above the number "
            "of clients: they "
            "reconnect in a loop.",
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
            "Connections that did not become a session. The reason names the limit or the fault.",
            units.CountsPerSecond,
            {"{{reason}}": rate("whaled_connections_refused_total", by="reason")},
            many=True,
            width=12,
        ),
        lines(
            "Closed by code",
            "Sessions ended by close code. 1008: credentials or rate; 1011: a bug, see the journal; 1012: a "
            "restart; 1013: slow clients "
            "or memory; 1005 and 1006: the client went without a word.",
            units.CountsPerSecond,
            {"{{code}}": rate("whaled_connections_closed_total", by="code")},
            many=True,
            width=12,
        ),
        lines(
            "Authentications by outcome",
            "unknown_key, bad_signature: a key was retired too early, or somebody guesses. expired: a client does "
            "not refresh its token.",
            units.CountsPerSecond,
            {"{{outcome}}": rate("whaled_authentications_total", by="outcome")},
            many=True,
            width=12,
        ),
        lines(
            "Messages rejected",
            "Client messages answered with an error, by its code. rate_limited: a client is too eager, or "
            "gateway.messages_per_second "
            "too low.",
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
            "Messages from clients by type. invalid growing: a client is broken.",
            units.MessagesPerSecond,
            {"{{type}}": rate("whaled_messages_received_total", by="type")},
            stacked=True,
        ),
        lines(
            "Messages out",
            "Frames for all clients by type. control is what one client alone is told: answers and notices.",
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
            "Events and alerts given to the hub. Lasting less than what the log commits: a bug.",
            units.EventsPerSecond,
            {
                "events committed": rate("whaled_eventlog_events_total"),
                "events published": rate("whaled_events_published_total"),
                "alerts published": rate("whaled_alerts_published_total"),
            },
        ),
        lines(
            "Filters in use",
            "Distinct filters; each is evaluated once per event, whatever the number of clients that share it.",
            units.Short,
            {"{{instance}}": of("whaled_filters")},
        ),
        lines(
            "Memory shedding",
            "1 while newcomers are refused and slow clients cut off to save memory.",
            units.Short,
            {"{{instance}}": of("whaled_memory_shedding")},
            limit=1,
        ),
    ]


def _slow() -> Row:
    return "Slow and returning clients", [
        lines(
            "Queued for clients",
            "Bytes written for clients that the kernel has not taken yet.",
            units.BytesIEC,
            {"{{instance}}": of("whaled_unsent_bytes")},
        ),
        lines(
            "Falling behind",
            "Times a client fell behind and was switched to replay (nothing is lost by it), and clients given up as "
            "too slow (1013).",
            units.CountsPerSecond,
            {
                "lagged": rate("whaled_clients_lagged_total"),
                "closed 1013": rate("whaled_connections_closed_total", 'code="1013"'),
            },
        ),
        lines(
            "Replays",
            "Replays from the log, by whether the position could be honoured. Not recovered: away longer than "
            "eventlog.retention, or the "
            "log was restored.",
            units.CountsPerSecond,
            {
                "recovered": rate("whaled_replays_total", 'recovered="true"'),
                "not recovered": rate("whaled_replays_total", 'recovered="false"'),
            },
            colors={"recovered": BLUE, "not recovered": RED},
        ),
        lines(
            "Replayed and live",
            "Event frames out of the log beside all of them. Replayed lasting near the whole: clients are slower "
            "than the news.",
            units.MessagesPerSecond,
            {
                "out of the log": rate("whaled_messages_replayed_total"),
                "all events": rate("whaled_messages_sent_total", 'type=~"whale_alert|whale_update"'),
            },
        ),
        lines(
            "Rate limited",
            "What was beyond a limit: messages of a client, authentications of an address, connections of an address.",
            units.CountsPerSecond,
            {
                "messages": rate("whaled_messages_rejected_total", 'code="rate_limited"'),
                "authentications": rate("whaled_authentications_total", 'outcome="rate_limited"'),
                "connections": rate("whaled_connections_refused_total", 'reason="address_cap"'),
            },
        ),
        lines(
            "Positions held",
            "The newest offset committed and the oldest held: between them a client can resume without loss.",
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
            "From the arrival of the backend's frame to the last write to a live client, for each frame with a whale.",
            "whaled_frame_to_sent_seconds",
        ),
        lines(
            "Frame to commit and to client",
            "From the arrival of the backend's frame to the commit of its events and to the last write to a live "
            "client. "
            "What lies between is the fan-out.",
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
            "From a canary's frame to its arrival. Dashed: the objective, within which 99.5 % must stay.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_canary_seconds") for share in (0.5, 0.9, 0.99)},
            steps=((None, "transparent"), (1, RED)),
            logarithmic=True,
            width=12,
        ),
        lines(
            "Canaries started and failed",
            "Canaries started, one every canary.interval, and those that did not arrive in time (late) or broke on "
            "the way (error).",
            units.CountsPerSecond,
            {
                "started": rate("whaled_canaries_sent_total"),
                "failed: {{reason}}": rate("whaled_canaries_failed_total", by="reason"),
            },
            width=12,
        ),
    ]


def dashboard() -> model.Dashboard:
    """The dashboard."""
    return framed(
        "whaled-delivery",
        "delivery",
        "Who connects, who is turned away, what goes in and out, and how fast.",
        [_summary(), _connections(), _traffic(), _slow(), _latency()],
    )
