"""What the backend sends, what whaled makes of it, and what happens to the whales."""

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
            "The link to the mempool backend. Degraded: it is connected, but the backend is not in sync and whales "
            "may not be seen.",
            f"min({LINK})",
            units.Short,
            ((None, RED), (1, YELLOW), (2, GREEN)),
            texts=[value_map(LINK_TEXTS)],
            width=4,
        ),
        number(
            "Last frame",
            "How long the backend has been silent. After upstream.stale_after without an answer the link is given up.",
            age("whaled_upstream_last_message_timestamp_seconds"),
            units.Seconds,
            ((None, GREEN), (60, YELLOW), (180, RED)),
            texts=[from_on(NEVER_HAPPENED, "none yet", YELLOW)],
            decimals=0,
            width=4,
        ),
        number(
            "Clock skew",
            "This machine's clock minus the backend's, from its last REST answer, the largest either way. Expiries, "
            "timestamps and "
            "latencies lie by as much if the clock here is the wrong one.",
            f"max(abs({of('whaled_upstream_clock_skew_seconds')}))",
            units.Seconds,
            ((None, GREEN), (2, YELLOW), (5, RED)),
            width=4,
        ),
        number(
            "Gaps",
            "Breaks in the backend's sequence in the range shown, its restarts included: transactions were missed.",
            f"""sum(increase({of("whaled_upstream_deltas_total", 'continuity=~"gap|restarted"')}[$__range]))""",
            units.Short,
            ((None, GREEN), (0.5, YELLOW), (20, RED)),
            decimals=0,
            width=4,
        ),
        number(
            "Transactions",
            "Transactions of the backend looked at. Mainnet has 3 to 10 a second.",
            rate("whaled_transactions_seen_total"),
            units.EventsPerSecond,
            NEUTRAL,
            trend=True,
            width=4,
        ),
        number(
            "Last whale",
            "How long ago a whale was last committed. Days are possible with a high detection.threshold_btc.",
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
            "Links lost and attempts failed. refused, timeout: is the backend up; not_mempool: is upstream.url "
            "right; stale: it fell silent.",
            units.CountsPerSecond,
            {"{{reason}}": rate("whaled_upstream_reconnects_total", by="reason")},
            many=True,
            width=12,
        ),
        lines(
            "Since the last frame",
            "How long the backend has been silent.",
            units.Seconds,
            {"{{instance}}": f"time() - ({of('whaled_upstream_last_message_timestamp_seconds')} > 0)"},
            steps=((None, "transparent"), (180, RED)),
            width=6,
        ),
        lines(
            "Clock skew",
            "This machine's clock minus the backend's, from its last REST answer, whichever way it differs.",
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
            "Messages from the backend, and transactions in them that were looked at.",
            units.EventsPerSecond,
            {"frames": rate("whaled_upstream_frames_total"), "transactions": rate("whaled_transactions_seen_total")},
        ),
        lines(
            "Bytes",
            "Bytes of messages from the backend.",
            units.BytesPerSecondIEC,
            {"in": rate("whaled_upstream_received_bytes_total")},
        ),
        lines(
            "Decode time",
            "Time to decode a message. The event loop stands still that long.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_upstream_decode_seconds") for share in (0.5, 0.99)},
            steps=((None, "transparent"), (0.25, RED)),
        ),
        lines(
            "Sequence",
            "Mempool deltas by how their sequence number continues. gap, restarted: transactions were missed; "
            "not_in_sync: the backend "
            "is starting.",
            units.EventsPerSecond,
            {"{{continuity}}": rate("whaled_upstream_deltas_total", by="continuity")},
            many=True,
            width=9,
        ),
        lines(
            "Not understood",
            "Messages of which nothing was usable by what was wrong, parts skipped, and keys that are not known "
            "(harmless). Was the "
            "backend upgraded?",
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
            "Links the backend answered on, per hour. Each but the first: transactions between two links were missed.",
            units.Short,
            {"{{instance}}": f"3600 * {rate('whaled_upstream_connects_total', by='instance')}"},
            width=6,
        ),
    ]


def _rest() -> Row:
    return "REST", [
        lines(
            "Requests by outcome",
            "REST requests to the backend, for what the stream does not tell. rate_limited, server_error: the "
            "backend is overloaded.",
            units.RequestsPerSecond,
            {"{{outcome}}": rate("whaled_rest_requests_total", by="outcome")},
            many=True,
            width=9,
        ),
        lines(
            "Request time",
            "Time of a REST request.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_rest_request_seconds") for share in (0.5, 0.9, 0.99)},
            width=6,
        ),
        lines(
            "Inputs unknown by reason",
            "Whales whose inputs could not be fetched, by reason; they are alerted without.",
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
            "Whales alerted, as a rate per hour. All unknown: there is no detection.address_book.",
            units.Short,
            {"{{flow}}": per_hour("whaled_whales_total", "flow")},
            stacked=True,
        ),
        lines(
            "Amount alerted",
            "Sum of the amounts of whales alerted, in bitcoin per hour, and what of it flowed.",
            units.Bictoin,
            {
                "all": f"{per_hour('whaled_whales_satoshi_total')} / 1e8",
                "{{flow}}": per_hour("whaled_whale_flow_btc_total", "flow"),
            },
        ),
        lines(
            "Fates",
            "What became of whales, as a rate per hour: in a block, replaced, gone from the mempool, back in it "
            "after a reorganisation.",
            units.Short,
            {"{{kind}}": per_hour("whaled_whale_updates_total", "kind")},
        ),
        lines(
            "Whales without inputs",
            "Whales alerted before the backend gave their inputs, beside all whales, per hour. See the REST row and "
            "detection.inputs_wait.",
            units.Short,
            {
                "all": per_hour("whaled_whales_total"),
                "inputs unknown": per_hour("whaled_whales_inputs_unknown_total"),
            },
        ),
        buckets(
            "Frame to commit",
            "From the arrival of the backend's frame to the commit of its events. High while the canary is fast: "
            "waiting for inputs.",
            "whaled_frame_to_commit_seconds",
            width=8,
        ),
        lines(
            "Commit time",
            "Time of a commit with new events, fsync included. Above 0.1 s the disk is slow or shared.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_eventlog_commit_seconds") for share in (0.5, 0.9, 0.99)},
            steps=((None, "transparent"), (0.1, YELLOW)),
        ),
    ]


def _backfill() -> Row:
    return "Backfill: what the stream did not tell", [
        lines(
            "Open questions",
            "What is still to be asked for: blocks to scan, whales of a snapshot, transactions of unknown value, fates "
            "of whales that left the mempool. Lasting: the backend cannot be asked, or "
            "backfill.requests_per_second is too low.",
            units.Short,
            {"{{what}}": f"max by (what) ({of('whaled_backfill_backlog')})"},
            many=True,
        ),
        lines(
            "Whales in blocks",
            "Whales of the blocks scanned, per hour, by when they were known: before it (seen), after it (late), or "
            "only because of it, and why.",
            units.Short,
            {"{{cover}}": per_hour("whaled_block_whales_total", "cover")},
            many=True,
        ),
        lines(
            "Lead",
            "How long before its block a whale was alerted.",
            units.Seconds,
            {f"p{share * 100:g}": quantile(share, "whaled_whale_lead_seconds") for share in (0.1, 0.5, 0.9)},
        ),
        lines(
            "Scans, snapshots, reorganisations",
            "Blocks looked through, times the whole mempool was asked for, and blocks that left the chain, per hour.",
            units.Short,
            {
                "blocks scanned": per_hour("whaled_blocks_scanned_total"),
                "snapshots": per_hour("whaled_mempool_snapshots_total"),
                "blocks that left the chain": per_hour("whaled_reorged_blocks_total"),
                "blocks skipped": per_hour("whaled_blocks_skipped_total"),
            },
        ),
        lines(
            "Questions that failed",
            "Questions that stay open, by reason. They are asked again.",
            units.EventsPerSecond,
            {"{{reason}}": rate("whaled_backfill_failures_total", by="reason")},
            many=True,
        ),
        lines(
            "Prediction",
            "Actual minus predicted block of whales that were confirmed: how far predicted_confirmation_block can be "
            "trusted. Positive is later.",
            units.Short,
            {f"p{share * 100:g}": quantile(share, "whaled_prediction_error_blocks") for share in (0.1, 0.5, 0.9)},
        ),
    ]


def _log() -> Row:
    return "Event log", [
        lines(
            "Events",
            "Events committed, and events removed by retention.",
            units.EventsPerSecond,
            {
                "committed": rate("whaled_eventlog_events_total"),
                "pruned": rate("whaled_eventlog_pruned_events_total"),
            },
            width=6,
        ),
        lines(
            "Failures by reason",
            "Operations of the event log that failed. At once: whaled does not publish what it cannot store.",
            units.EventsPerSecond,
            {"{{reason}}": rate("whaled_eventlog_failures_total", by="reason")},
            many=True,
            width=12,
        ),
        lines(
            "Size",
            "Database and write-ahead log on disk. eventlog.retention bounds it.",
            units.BytesIEC,
            {"{{instance}}": of("whaled_eventlog_size_bytes")},
            width=6,
        ),
    ]


def dashboard() -> model.Dashboard:
    """The dashboard."""
    return framed(
        "whaled-upstream",
        "upstream and detection",
        "What the backend sends, what whaled makes of it, and what happens to the whales.",
        [_summary(), _link(), _stream(), _rest(), _detection(), _backfill(), _log()],
    )
