"""Is whaled healthy, and what is it doing: what an operator asks first, in that order."""

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

# Of the canaries that ended within 30 days, those that arrived within a second; the rest is what the budget pays for.
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
            "Whether /metrics answered the last scrape. The event loop serves it: down also means stuck. "
            "Of several whaled the worst, here and in this whole row.",
            f"min({of('up')})",
            units.Short,
            ((None, RED), (1, GREEN)),
            texts=[value_map({1: ("UP", GREEN), 0: ("DOWN", RED)})],
        ),
        number(
            "Backend",
            "The link to the mempool backend. Degraded: it is connected, but the backend is not in sync and whales "
            "may not be seen.",
            f"min({LINK})",
            units.Short,
            ((None, RED), (1, YELLOW), (2, GREEN)),
            texts=[value_map(LINK_TEXTS)],
        ),
        number(
            "Last canary",
            "How long ago a canary last made the way of a whale: decoded, detected, committed, delivered. One "
            "starts every 30 s. "
            "While it is old, whales would not arrive either.",
            age("whaled_last_canary_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (60, YELLOW), (120, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", YELLOW)],
            decimals=0,
        ),
        number(
            "Error budget left",
            "Objective: 99.5 % of canaries arrive within 1 s over 30 days. 100 %: untouched, 0: used up, below: "
            "missed. "
            "Over as much of the 30 days as Prometheus keeps; always 30 days, whatever range is shown.",
            BUDGET_LEFT,
            units.PercentUnit,
            ((None, RED), (0, YELLOW), (0.25, GREEN)),
            decimals=1,
        ),
        number(
            "Alerts firing",
            "Alerts of deploy/prometheus that fire for the whaled chosen. 0 says nothing where those rules are not "
            "loaded.",
            f"""count({of("ALERTS", 'alertstate="firing"')}) or vector(0)""",
            units.Short,
            GOOD_IF_ZERO,
        ),
        number(
            "Errors",
            "Errors of all components in the range shown. Which ones: the last row; why: the journal.",
            f"sum(increase({of('whaled_errors_total')}[$__range]))",
            units.Short,
            ((None, GREEN), (0.5, YELLOW), (20, RED)),
            decimals=0,
        ),
        number(
            "Memory of limit",
            "Memory used of memory.limit or of the cgroup's. From 85 % on (memory.shed_at) newcomers are refused "
            "and the slowest "
            "clients cut off.",
            f"max({of('whaled_memory_used_bytes')} / {of('whaled_memory_limit_bytes')})",
            units.PercentUnit,
            ((None, GREEN), (0.75, YELLOW), (0.85, RED)),
            texts=[value_map({0: ("no limit", GREY)})],
            trend=True,
            decimals=0,
        ),
        number(
            "Event-loop lag",
            "How late one timer in 100 fires. Everything waits as long: frames, clients, this very scrape.",
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
            "Open client connections, those not authenticated yet included.",
            f"sum({of('whaled_connections')})",
            units.Short,
            NEUTRAL,
            trend=True,
            decimals=0,
        ),
        number(
            "Last whale",
            "How long ago a whale was last committed. Days are possible with a high detection.threshold_btc.",
            age("whaled_last_whale_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (12 * 3600, YELLOW), (DAY, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", GREY)],
        ),
        number(
            "Last frame",
            "How long the backend has been silent. After upstream.stale_after without an answer the link is given up.",
            age("whaled_upstream_last_message_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (60, YELLOW), (180, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", YELLOW)],
            decimals=0,
        ),
        number(
            "Disk free",
            "Free on the event log's file system. A full one: no event is stored, none is delivered.",
            f"min({of('whaled_eventlog_disk_free_bytes')} / {of('whaled_eventlog_disk_size_bytes')})",
            units.PercentUnit,
            ((None, RED), (0.05, YELLOW), (0.15, GREEN)),
            decimals=0,
        ),
        number(
            "Last reload",
            "Whether the last reload was applied. Refused: the configuration before it is still in force, and a "
            "restart would fail.",
            f"min({of('whaled_config_last_reload_successful')})",
            units.Short,
            ((None, RED), (1, GREEN)),
            texts=[value_map({1: ("applied", GREEN), 0: ("REFUSED", RED)})],
        ),
        number(
            "Authentication",
            "Off: everybody who can connect reads the alerts. Only ever on loopback.",
            f"max({of('whaled_authentication_disabled')})",
            units.Short,
            GOOD_IF_ZERO,
            texts=[value_map({0: ("required", GREEN), 1: ("OFF", RED)})],
        ),
        number(
            "Certificate left",
            "Until the TLS certificate in use ends. Renew the files and reload.",
            f"min({of('whaled_certificate_expiry_timestamp_seconds')}) - time()",
            units.Seconds,
            ((None, RED), (2 * DAY, YELLOW), (14 * DAY, GREEN)),
            texts=[from_on(NEVER_ENDS, "no TLS", GREY)],
            decimals=0,
        ),
        number(
            "Signing key age",
            "Since the key that signs was made. Rotate it in time.",
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
            "Whales alerted, as a rate per hour. All unknown: there is no detection.address_book.",
            units.Short,
            {"{{flow}}": per_hour("whaled_whales_total", "flow")},
            stacked=True,
        ),
        lines(
            "Whales by source",
            "How whales were found, as a rate per hour: live in the stream, or later in a snapshot or a block.",
            units.Short,
            {"{{source}}": per_hour("whaled_whale_sources_total", "source")},
        ),
        lines(
            "From frame to client",
            "From the arrival of the backend's frame: to the commit of its events, and to the last write to a live "
            "client. "
            "The canary is whaled's own measure of the same way. Dashed: the objective of 1 s.",
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
            "Open connections; of them those that get events as they are published, those being brought up to date "
            "from the log, and those not authenticated yet.",
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
            "Frames for all clients by type. control is what one client alone is told: answers and notices.",
            units.MessagesPerSecond,
            {"{{type}}": rate("whaled_messages_sent_total", by="type")},
            stacked=True,
        ),
        lines(
            "Turned away",
            "Connections that did not become a session, credentials presented and not accepted, messages beyond the "
            "rate, and clients that fell behind (they get the rest out of the log). Reasons: the delivery dashboard.",
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
            "Time of a commit with new events, fsync included. Above 0.1 s the disk is slow or shared.",
            units.Seconds,
            {
                "p50": quantile(0.5, "whaled_eventlog_commit_seconds"),
                "p99": quantile(0.99, "whaled_eventlog_commit_seconds"),
            },
            steps=((None, "transparent"), (0.1, YELLOW)),
        ),
        lines(
            "Log head",
            "The newest offset committed. Positions of clients count in it; it only grows.",
            units.Short,
            {"{{instance}}": of("whaled_eventlog_head_offset")},
            floating=True,
        ),
        lines(
            "Log size",
            "Database and write-ahead log on disk. eventlog.retention bounds it.",
            units.BytesIEC,
            {"{{instance}}": of("whaled_eventlog_size_bytes")},
        ),
    ]


def _process() -> Row:
    return "Process", [
        lines(
            "Memory",
            "Memory used (of the cgroup if that is limited, else resident) and its limit. Without a limit there is "
            "no line for it.",
            units.BytesIEC,
            {
                "used {{instance}}": of("whaled_memory_used_bytes"),
                "resident {{instance}}": of("process_resident_memory_bytes"),
                "limit {{instance}}": f"{of('whaled_memory_limit_bytes')} < Inf",
            },
        ),
        lines(
            "CPU",
            "Cores in use. whaled decodes, detects and delivers in one thread: 1 is all it can use but for the "
            "log's two.",
            units.PercentUnit,
            {"{{instance}}": rate("process_cpu_seconds_total", by="instance")},
            steps=((None, "transparent"), (0.8, YELLOW)),
        ),
        lines(
            "Event-loop lag",
            "How late timers of the event loop fire, looked at twice a second.",
            units.Seconds,
            {
                "p50": quantile(0.5, "whaled_event_loop_lag_seconds"),
                "p99": quantile(0.99, "whaled_event_loop_lag_seconds"),
            },
            steps=((None, "transparent"), (0.25, RED)),
        ),
        lines(
            "Errors by component",
            "Errors a second by the component that met them; the journal has a line for each. On a good day all are 0.",
            units.EventsPerSecond,
            {"{{component}}": rate("whaled_errors_total", by="component")},
            width=12,
        ),
        lines(
            "How near the limits",
            "Shares in use, of several whaled the largest: of memory (0 without a limit), of LimitNOFILE, of "
            "gateway.max_connections, of the event log's file system. Dashed: where an alert stands for most of them.",
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
    """The dashboard."""
    return framed(
        "whaled-overview",
        "overview",
        "Is whaled healthy, and what is it doing.",
        [_answers(), _situation(), _whales(), _clients(), _log(), _process()],
    )
