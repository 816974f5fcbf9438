"""The overview: whether whaled is healthy, and what it is doing."""

from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import units

from tools.dashboards.frame import Row
from tools.dashboards.frame import dashboard as framed
from tools.dashboards.kit import (
    GOOD_IF_ZERO,
    GREEN,
    GREY,
    NEUTRAL,
    NEVER_ENDS,
    NEVER_HAPPENED,
    RED,
    YELLOW,
    age,
    from_on,
    lines,
    number,
    of,
    per_hour,
    quantile,
    rate,
    value_map,
)

DAY = 86_400
OBJECTIVE = 0.995

# The share of the canaries of the last 30 days that arrived within a second. The others use up the error budget.
_ENDED = (
    f"(sum(increase({of('whaled_canary_seconds_count')}[30d]))"
    f" + sum(increase({of('whaled_canaries_failed_total')}[30d])))"
)
_IN_TIME = f"""sum(increase({of("whaled_canary_seconds_bucket", 'le="1.0"')}[30d]))"""
BUDGET_LEFT = f"1 - (1 - {_IN_TIME} / {_ENDED}) / {1 - OBJECTIVE:g}"
LINK = (
    f"""2 * {of("whaled_upstream_state", 'state="connected"')}"""
    f""" + ignoring(state) {of("whaled_upstream_state", 'state="degraded"')}"""
)
LINK_TEXTS = {2: ("connected", GREEN), 1: ("degraded", YELLOW), 0: ("LOST", RED)}


def _answers() -> Row:
    return "Is it healthy?", [
        number(
            "Up",
            "Whether /metrics responded to the last scrape. The event loop serves it, so DOWN also means that the loop "
            "is blocked. With several instances, this row shows the worst one.",
            f"min({of('up')})",
            units.Short,
            ((None, RED), (1, GREEN)),
            texts=[value_map({1: ("UP", GREEN), 0: ("DOWN", RED)})],
        ),
        number(
            "Backend",
            "The link to the mempool backend. Degraded: it is connected, but the backend is not in sync, so whales "
            "may be missing.",
            f"min({LINK})",
            units.Short,
            ((None, RED), (1, YELLOW), (2, GREEN)),
            texts=[value_map(LINK_TEXTS)],
        ),
        number(
            "Last canary",
            "Time since a canary last passed through the pipeline like a whale: decoded, detected, committed, "
            "delivered. One starts every 30 s. While the last one is old, whales would not arrive either.",
            age("whaled_last_canary_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (60, YELLOW), (120, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", YELLOW)],
            decimals=0,
        ),
        number(
            "Error budget left",
            "Objective: 99.5 % of canaries arrive within 1 s over 30 days. 100 %: unused; 0: used up; negative: the "
            "objective is missed. It always covers 30 days, whatever range is displayed, or less if Prometheus keeps "
            "less.",
            BUDGET_LEFT,
            units.PercentUnit,
            ((None, RED), (0, YELLOW), (0.25, GREEN)),
            decimals=1,
        ),
        number(
            "Alerts firing",
            "Alerts of deploy/prometheus that fire for the selected instances. 0 means nothing if those rules are not "
            "loaded.",
            f"""count({of("ALERTS", 'alertstate="firing"')}) or vector(0)""",
            units.Short,
            GOOD_IF_ZERO,
        ),
        number(
            "Errors",
            "Errors of all components in the displayed range. The last row shows the components, the journal the "
            "causes.",
            f"sum(increase({of('whaled_errors_total')}[$__range]))",
            units.Short,
            ((None, GREEN), (0.5, YELLOW), (20, RED)),
            decimals=0,
        ),
        number(
            "Memory of limit",
            "Memory used, as a share of memory.limit or the cgroup's limit. From 85 % on (memory.shed_at) whaled "
            "refuses new clients and closes the slowest ones.",
            f"max({of('whaled_memory_used_bytes')} / {of('whaled_memory_limit_bytes')})",
            units.PercentUnit,
            ((None, GREEN), (0.75, YELLOW), (0.85, RED)),
            texts=[value_map({0: ("no limit", GREY)})],
            trend=True,
            decimals=0,
        ),
        number(
            "Event-loop lag",
            "The delay of one timer in 100. Everything else is delayed as much: frames, clients, scrapes.",
            quantile(0.99, "whaled_event_loop_lag_seconds"),
            units.Seconds,
            ((None, GREEN), (0.1, YELLOW), (0.25, RED)),
            trend=True,
        ),
    ]


def _situation() -> Row:
    return "What is it doing?", [
        number(
            "Clients",
            "Open client connections, including unauthenticated ones.",
            f"sum({of('whaled_connections')})",
            units.Short,
            NEUTRAL,
            trend=True,
            decimals=0,
        ),
        number(
            "Last whale",
            "Time since a whale was last committed. With a high detection.threshold_btc it may be days.",
            age("whaled_last_whale_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (12 * 3600, YELLOW), (DAY, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", GREY)],
        ),
        number(
            "Last frame",
            "Time since the backend's last frame. After upstream.stale_after without a response the link is closed.",
            age("whaled_upstream_last_message_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (60, YELLOW), (180, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", YELLOW)],
            decimals=0,
        ),
        number(
            "Disk free",
            "Free space on the event log's file system. If it is full, no events are stored or delivered.",
            f"min({of('whaled_eventlog_disk_free_bytes')} / {of('whaled_eventlog_disk_size_bytes')})",
            units.PercentUnit,
            ((None, RED), (0.05, YELLOW), (0.15, GREEN)),
            decimals=0,
        ),
        number(
            "Last reload",
            "Whether the last reload was applied. Refused: the previous configuration is still in effect, and a "
            "restart would fail.",
            f"min({of('whaled_config_last_reload_successful')})",
            units.Short,
            ((None, RED), (1, GREEN)),
            texts=[value_map({1: ("applied", GREEN), 0: ("REFUSED", RED)})],
        ),
        number(
            "Authentication",
            "OFF: every client that can connect receives alerts. Use this only on loopback.",
            f"max({of('whaled_authentication_disabled')})",
            units.Short,
            GOOD_IF_ZERO,
            texts=[value_map({0: ("required", GREEN), 1: ("OFF", RED)})],
        ),
        number(
            "Certificate left",
            "Time until the current TLS certificate expires. Renew the files and reload.",
            f"min({of('whaled_certificate_expiry_timestamp_seconds')}) - time()",
            units.Seconds,
            ((None, RED), (2 * DAY, YELLOW), (14 * DAY, GREEN)),
            texts=[from_on(NEVER_ENDS, "no TLS", GREY)],
            decimals=0,
        ),
        number(
            "Signing key age",
            "Time since the signing key was generated. Rotate it in time.",
            age("whaled_signing_key_created_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (180 * DAY, YELLOW), (365 * DAY, RED)),
            texts=[from_on(NEVER_HAPPENED, "no key", GREY)],
            decimals=0,
        ),
    ]


def _whales() -> Row:
    return "Whales", [
        lines(
            "Whales by flow",
            "Alerted whales per hour. If all are unknown, detection.address_book is not set.",
            units.Short,
            {"{{flow}}": per_hour("whaled_whales_total", "flow")},
            stacked=True,
        ),
        lines(
            "Whales by source",
            "Alerted whales per hour by source: live in the stream, or later in a mempool comparison or a block.",
            units.Short,
            {"{{source}}": per_hour("whaled_whale_sources_total", "source")},
        ),
        lines(
            "From frame to client",
            "Time from the receipt of the backend's frame to the commit of its events, and to the last write to a live "
            "client. The canary measures the same path. Dashed: the objective of 1 s.",
            units.Seconds,
            {
                "committed p50": quantile(0.5, "whaled_frame_to_commit_seconds"),
                "committed p99": quantile(0.99, "whaled_frame_to_commit_seconds"),
                "sent p50": quantile(0.5, "whaled_frame_to_sent_seconds"),
                "sent p99": quantile(0.99, "whaled_frame_to_sent_seconds"),
                "canary p99": quantile(0.99, "whaled_canary_seconds"),
            },
            steps=((None, "transparent"), (1, RED)),
            logarithmic=True,
        ),
    ]


def _clients() -> Row:
    return "Clients", [
        lines(
            "Clients",
            "Open connections: those in live delivery, those in replay from the log, and unauthenticated ones.",
            units.Short,
            {
                "open": f"sum({of('whaled_connections')})",
                "live": f"sum({of('whaled_clients_live')})",
                "replaying": f"sum({of('whaled_clients_replaying')})",
                "not authenticated": f"sum({of('whaled_connections_unauthenticated')})",
            },
        ),
        lines(
            "Sent",
            "Frames sent to all clients by type. control: responses and notices to a single client.",
            units.MessagesPerSecond,
            {"{{type}}": rate("whaled_messages_sent_total", by="type")},
            stacked=True,
        ),
        lines(
            "Turned away",
            "Refused connections, refused credentials, messages above the rate limit, and clients that fell behind "
            "(which are replayed from the log). The delivery dashboard shows the reasons.",
            units.CountsPerSecond,
            {
                "refused": rate("whaled_connections_refused_total"),
                "not authenticated": rate("whaled_authentications_total", 'outcome!="success"'),
                "rate limited": rate("whaled_messages_rejected_total", 'code="rate_limited"'),
                "fell behind": rate("whaled_clients_lagged_total"),
            },
        ),
    ]


def _log() -> Row:
    return "Event log", [
        lines(
            "Commit time",
            "Duration of a commit of new events, including fsync. Above 0.1 s the disk is slow or shared.",
            units.Seconds,
            {
                "p50": quantile(0.5, "whaled_eventlog_commit_seconds"),
                "p99": quantile(0.99, "whaled_eventlog_commit_seconds"),
            },
            steps=((None, "transparent"), (0.1, YELLOW)),
        ),
        lines(
            "Log head",
            "The newest committed offset, which only grows. Clients' positions are offsets in the log.",
            units.Short,
            {"{{instance}}": of("whaled_eventlog_head_offset")},
            floating=True,
        ),
        lines(
            "Log size",
            "Size of the database and its write-ahead log on disk, limited by eventlog.retention.",
            units.BytesIEC,
            {"{{instance}}": of("whaled_eventlog_size_bytes")},
        ),
    ]


def _process() -> Row:
    return "Process", [
        lines(
            "Memory",
            "Memory used (of the cgroup if it has a limit, else resident), and the limit, if there is one. Right axis: "
            "blocks of Python's allocator. If they grow for days with the same load, a leak; if only memory does, "
            "fragmentation.",
            units.BytesIEC,
            {
                "used {{instance}}": of("whaled_memory_used_bytes"),
                "resident {{instance}}": of("process_resident_memory_bytes"),
                "anonymous {{instance}}": of("whaled_memory_anonymous_bytes"),
                "limit {{instance}}": f"{of('whaled_memory_limit_bytes')} < Inf",
                "blocks {{instance}}": of("whaled_memory_allocated_blocks"),
            },
            counts="blocks",
        ),
        lines(
            "CPU",
            "Cores in use. whaled decodes, detects and delivers in one thread, so it can use one core, in addition to "
            "the log's two threads.",
            units.PercentUnit,
            {"{{instance}}": rate("process_cpu_seconds_total", by="instance")},
            steps=((None, "transparent"), (0.8, YELLOW)),
        ),
        lines(
            "Event-loop lag",
            "The delay of timers of the event loop, sampled twice a second.",
            units.Seconds,
            {
                "p50": quantile(0.5, "whaled_event_loop_lag_seconds"),
                "p99": quantile(0.99, "whaled_event_loop_lag_seconds"),
            },
            steps=((None, "transparent"), (0.25, RED)),
        ),
        lines(
            "Errors by component",
            "Errors per second by component; normally all are 0. The journal has a line for each error.",
            units.EventsPerSecond,
            {"{{component}}": rate("whaled_errors_total", by="component")},
            width=12,
        ),
        lines(
            "How near the limits",
            "Used shares of memory (0 without a limit), LimitNOFILE, gateway.max_connections, and the event log's file "
            "system; the largest of several instances. Dashed: the threshold of most of their alerts.",
            units.PercentUnit,
            {
                "memory": f"max({of('whaled_memory_used_bytes')} / {of('whaled_memory_limit_bytes')})",
                "file descriptors": f"max({of('process_open_fds')} / {of('process_max_fds')})",
                "connections": f"max({of('whaled_connections')} / {of('whaled_connections_limit')})",
                "disk": f"1 - min({of('whaled_eventlog_disk_free_bytes')} / {of('whaled_eventlog_disk_size_bytes')})",
            },
            steps=((None, "transparent"), (0.8, YELLOW)),
            limit=1,
            width=12,
        ),
    ]


def dashboard() -> model.Dashboard:
    """Build the dashboard."""
    return framed(
        "whaled-overview",
        "overview",
        "Whether whaled is healthy, and what it is doing.",
        [_answers(), _situation(), _whales(), _clients(), _log(), _process()],
    )
