"""The link to the backend, its stream and REST, detection, backfill, and the event log."""

from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import units

from tools.dashboards.frame import Row
from tools.dashboards.frame import dashboard as framed
from tools.dashboards.kit import (
    GREEN,
    GREY,
    NEUTRAL,
    NEVER_HAPPENED,
    RED,
    YELLOW,
    age,
    buckets,
    from_on,
    lines,
    number,
    of,
    per_hour,
    quantile,
    rate,
    states,
    value_map,
)
from tools.dashboards.overview import DAY, LINK, LINK_TEXTS


def _summary() -> Row:
    return "Is the backend there?", [
        number(
            "Backend",
            "The link to the mempool backend. Degraded: it is connected, but the backend is not in sync, so whales "
            "may be missing.",
            f"min({LINK})",
            units.Short,
            ((None, RED), (1, YELLOW), (2, GREEN)),
            texts=[value_map(LINK_TEXTS)],
            width=4,
        ),
        number(
            "Last frame",
            "Time since the backend's last frame. After upstream.stale_after without a response the link is closed.",
            age("whaled_upstream_last_message_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (60, YELLOW), (180, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", YELLOW)],
            decimals=0,
            width=4,
        ),
        number(
            "Clock skew",
            "The largest difference between this machine's clock and the backend's, from its last REST response. If "
            "this machine's clock is wrong, so are expiries, timestamps and latencies.",
            f"max(abs({of('whaled_upstream_clock_skew_seconds')}))",
            units.Seconds,
            ((None, GREEN), (2, YELLOW), (5, RED)),
            width=4,
        ),
        number(
            "Gaps",
            "Gaps in the backend's sequence in the displayed range, including its restarts: transactions were missed.",
            f"""sum(increase({of("whaled_upstream_deltas_total", 'continuity=~"gap|restarted"')}[$__range]))""",
            units.Short,
            ((None, GREEN), (0.5, YELLOW), (20, RED)),
            decimals=0,
            width=4,
        ),
        number(
            "Transactions",
            "Transactions from the backend that were examined. Mainnet has 3 to 10 per second.",
            rate("whaled_transactions_seen_total"),
            units.EventsPerSecond,
            NEUTRAL,
            trend=True,
            width=4,
        ),
        number(
            "Last whale",
            "Time since a whale was last committed. With a high detection.threshold_btc it may be days.",
            age("whaled_last_whale_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (DAY / 2, YELLOW), (DAY, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", GREY)],
            width=4,
        ),
    ]


def _link() -> Row:
    return "Link", [
        states(
            "State",
            "The state of the link over time.",
            f"max by (instance) ({LINK})",
            "{{instance}}",
            LINK_TEXTS,
            width=24,
        ),
        lines(
            "Reconnects by reason",
            "Lost links and failed attempts. refused, timeout: check that the backend is running; not_mempool: check "
            "upstream.url; stale: the backend stopped sending.",
            units.CountsPerSecond,
            {"{{reason}}": rate("whaled_upstream_reconnects_total", by="reason")},
            many=True,
            width=12,
        ),
        lines(
            "Since the last frame",
            "Time since the backend's last frame.",
            units.Seconds,
            {"{{instance}}": f"time() - ({of('whaled_upstream_last_message_timestamp_seconds')} > 0)"},
            steps=((None, "transparent"), (180, RED)),
            width=6,
        ),
        lines(
            "Clock skew",
            "Difference between this machine's clock and the backend's, from its last REST response.",
            units.Seconds,
            {"{{instance}}": f"abs({of('whaled_upstream_clock_skew_seconds')})"},
            steps=((None, "transparent"), (5, RED)),
            width=6,
        ),
    ]


def _stream() -> Row:
    return "Stream", [
        lines(
            "Frames and transactions",
            "Messages from the backend, and examined transactions in them.",
            units.EventsPerSecond,
            {"frames": rate("whaled_upstream_frames_total"), "transactions": rate("whaled_transactions_seen_total")},
        ),
        lines(
            "Bytes",
            "Bytes received from the backend in messages.",
            units.BytesPerSecondIEC,
            {"in": rate("whaled_upstream_received_bytes_total")},
        ),
        lines(
            "Decode time",
            "Time to decode a message, during which the event loop is blocked.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_upstream_decode_seconds") for share in (0.5, 0.99)},
            steps=((None, "transparent"), (0.25, RED)),
        ),
        lines(
            "Sequence",
            "Mempool deltas by the continuity of their sequence number. gap, restarted: transactions were missed; "
            "not_in_sync: the backend is starting.",
            units.EventsPerSecond,
            {"{{continuity}}": rate("whaled_upstream_deltas_total", by="continuity")},
            many=True,
            width=9,
        ),
        lines(
            "Not decoded",
            "Undecodable messages by fault, skipped parts, and unknown keys (harmless). A possible cause is an upgrade "
            "of the backend.",
            units.EventsPerSecond,
            {
                "undecodable: {{fault}}": rate("whaled_upstream_frames_undecodable_total", by="fault"),
                "parts skipped": rate("whaled_upstream_parts_skipped_total"),
                "keys unknown": rate("whaled_upstream_keys_unknown_total"),
            },
            many=True,
            width=9,
        ),
        lines(
            "Links",
            "Established links per hour. With each one except the first, the stream missed the transactions since the "
            "previous link.",
            units.Short,
            {"{{instance}}": f"3600 * {rate('whaled_upstream_connects_total', by='instance')}"},
            width=6,
        ),
    ]


def _rest() -> Row:
    return "REST", [
        lines(
            "Requests by outcome",
            "REST requests to the backend, for data that the stream does not contain. rate_limited, server_error: the "
            "backend is overloaded.",
            units.RequestsPerSecond,
            {"{{outcome}}": rate("whaled_rest_requests_total", by="outcome")},
            many=True,
            width=9,
        ),
        lines(
            "Request time",
            "Duration of a REST request.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_rest_request_seconds") for share in (0.5, 0.9, 0.99)},
            width=6,
        ),
        lines(
            "Inputs unknown by reason",
            "Whales whose inputs could not be fetched, by reason; they are alerted without inputs.",
            units.EventsPerSecond,
            {"{{reason}}": rate("whaled_rest_inputs_unknown_total", by="reason")},
            many=True,
            width=9,
        ),
    ]


def _detection() -> Row:
    return "Detection", [
        lines(
            "Whales by flow",
            "Alerted whales per hour. If all are unknown, detection.address_book is not set.",
            units.Short,
            {"{{flow}}": per_hour("whaled_whales_total", "flow")},
            stacked=True,
        ),
        lines(
            "Alerted amount",
            "Sum of the amounts of alerted whales, in bitcoin per hour, and the part that flowed.",
            units.Bictoin,
            {
                "all": f"{per_hour('whaled_whales_satoshi_total')} / 1e8",
                "{{flow}}": per_hour("whaled_whale_flow_btc_total", "flow"),
            },
        ),
        lines(
            "Outcomes",
            "Updates of whales per hour: confirmed, replaced, dropped, or pending again after a reorganisation.",
            units.Short,
            {"{{kind}}": per_hour("whaled_whale_updates_total", "kind")},
        ),
        lines(
            "Whales without inputs",
            "Whales alerted before the backend returned their inputs, and all whales, per hour. See the REST row and "
            "detection.inputs_wait.",
            units.Short,
            {
                "all": per_hour("whaled_whales_total"),
                "inputs unknown": per_hour("whaled_whales_inputs_unknown_total"),
            },
        ),
        buckets(
            "Frame to commit",
            "Time from the receipt of the backend's frame to the commit of its events. If it is high while the canary "
            "is fast, alerts wait for inputs.",
            "whaled_frame_to_commit_seconds",
            width=8,
        ),
        lines(
            "Commit time",
            "Duration of a commit of new events, including fsync. Above 0.1 s the disk is slow or shared.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_eventlog_commit_seconds") for share in (0.5, 0.9, 0.99)},
            steps=((None, "transparent"), (0.1, YELLOW)),
        ),
    ]


def _backfill() -> Row:
    return "Backfill: what the stream missed", [
        lines(
            "Backlog",
            "Pending requests: blocks to scan, whales of a mempool comparison, transactions of unknown value, outcomes "
            "of whales that left the mempool. If it does not shrink, the backend does not respond, or "
            "backfill.requests_per_second is too low.",
            units.Short,
            {"{{what}}": f"max by (what) ({of('whaled_backfill_backlog')})"},
            many=True,
        ),
        lines(
            "Whales in blocks",
            "Whales of the scanned blocks, per hour: known before the block (seen), alerted after it (late), or found "
            "only by the scan, with the reason.",
            units.Short,
            {"{{cover}}": per_hour("whaled_block_whales_total", "cover")},
            many=True,
        ),
        lines(
            "Lead",
            "Time from a whale's alert to its block.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_whale_lead_seconds") for share in (0.1, 0.5, 0.9)},
        ),
        lines(
            "Scans, comparisons, reorganisations",
            "Block scans, mempool comparisons, and blocks that left the chain, per hour.",
            units.Short,
            {
                "blocks scanned": per_hour("whaled_blocks_scanned_total"),
                "snapshots": per_hour("whaled_mempool_snapshots_total"),
                "blocks that left the chain": per_hour("whaled_reorged_blocks_total"),
                "blocks skipped": per_hour("whaled_blocks_skipped_total"),
            },
        ),
        lines(
            "Failed requests",
            "Backfill requests that failed, by reason. They are retried.",
            units.EventsPerSecond,
            {"{{reason}}": rate("whaled_backfill_failures_total", by="reason")},
            many=True,
        ),
        lines(
            "Prediction",
            "Actual minus predicted block of confirmed whales, that is, the error of predicted_confirmation_block. "
            "Positive means later.",
            units.Short,
            {f"p{share * 100:g}": quantile(share, "whaled_prediction_error_blocks") for share in (0.1, 0.5, 0.9)},
        ),
    ]


def _log() -> Row:
    return "Event log", [
        lines(
            "Events",
            "Committed events, and events removed by retention.",
            units.EventsPerSecond,
            {
                "committed": rate("whaled_eventlog_events_total"),
                "pruned": rate("whaled_eventlog_pruned_events_total"),
            },
            width=6,
        ),
        lines(
            "Failures by reason",
            "Failed operations of the event log. Act at once: whaled does not publish events that it cannot store.",
            units.EventsPerSecond,
            {"{{reason}}": rate("whaled_eventlog_failures_total", by="reason")},
            many=True,
            width=12,
        ),
        lines(
            "Size",
            "Size of the database and its write-ahead log on disk, limited by eventlog.retention.",
            units.BytesIEC,
            {"{{instance}}": of("whaled_eventlog_size_bytes")},
            width=6,
        ),
    ]


def dashboard() -> model.Dashboard:
    """Build the dashboard."""
    return framed(
        "whaled-upstream",
        "upstream and detection",
        "The link to the backend, its stream and REST, detection, backfill, and the event log.",
        [_summary(), _link(), _stream(), _rest(), _detection(), _backfill(), _log()],
    )
