"""The log events of the daemon. Pure.

Log calls name an event by its identifier, `logger.warning("upstream_sequence_gap", expected=7, sequence=9)`, and
`ops/logs` adds the message. Operators filter by identifiers, so these never change; messages may be reworded.
docs/logs.md has the level, the fields and the meaning of each event.
"""

# The message of each event, for people, by identifier. An identifier is a noun and a participle or adjective.
MESSAGES = {
    # Start and stop
    "configuration_read": "configuration read",
    "configuration_warning": "the configuration is valid, but a part of it may not do what is meant",
    "descriptor_limit_low": "file descriptors are limited: fewer client connections are possible than "
    "gateway.max_connections; raise LimitNOFILE= (without systemd: ulimit -n)",
    "signing_keys_loaded": "signing keys loaded",
    "issuer_keys_fetched": "the keys of an issuer were fetched",
    "issuer_keys_unavailable": "cannot fetch the keys of an issuer: the last ones stay in use",
    "issuer_fetch_failed": "a bug ended a fetch of the keys of an issuer: the last ones stay in use",
    "access_database_failed": "the access database cannot be read or written: new revocations of other processes do "
    "not take effect",
    "api_key_uses_unstored": "the last uses of API keys could not be stored; they are stored later",
    "access_database_recovered": "the access database can be read and written again",
    "token_register_full": "refreshed tokens are not in the register: the access database is too slow or fails",
    "authentication_disabled": "authentication is disabled: anyone who can connect can read the alerts",
    "systemd_sockets_used": "listening on sockets from systemd: host and port of this section are ignored",
    "listen_address_missing": "cannot listen on one of the configured addresses: no client reaches whaled there",
    "previous_run_unclean": "the previous run did not stop cleanly: it crashed or was killed",
    "run_unrecorded": "cannot record the start or the stop of this run in the event log",
    "daemon_ready": "ready",
    "daemon_stopping": "stopping",
    "stop_forced": "second signal received: exiting at once",
    "stop_message_abandoned": "stopping before the message in progress was handled",
    "drain_window_exceeded": "the drain window has ended: the remaining clients are cut off",
    "daemon_stopped": "stopped",
    "daemon_crashed": "a bug ended the daemon",
    # Reload
    "reload_started": "reloading the configuration",
    "reload_finished": "configuration reloaded",
    "reload_refused": "reload refused: the old configuration stays in force",
    "reload_failed": "reload failed because of a bug: the old configuration stays in force",
    "reload_queued": "a reload is in progress: another one follows it",
    "reload_ignored": "reload request ignored: the daemon is stopping",
    "reload_outcome_unstored": "cannot store the outcome of the reload: `systemctl reload` and `whaled reload` will "
    "time out",
    # Address book
    "address_book_read": "address book read",
    "address_book_doubtful": "a part of the address book may not have the effect that is meant",
    "address_book_network_mismatch": "the address book has addresses of another network than the backend's",
    "watch_rule_idle": "a rule of detection.watch matches nothing",
    # Whales
    "whale_detected": "whale detected",
    "whale_updated": "whale status changed",
    "whale_inputs_unknown": "the inputs of a whale remain unknown",
    "usd_threshold_suspended": "the price is unknown or too old: detection.threshold_usd matches nothing until it is "
    "known",
    "usd_threshold_resumed": "the price is known: detection.threshold_usd applies again",
    # Link to the backend
    "upstream_connected": "connected to the mempool backend",
    "upstream_link_lost": "no link to the mempool backend",
    "upstream_degraded": "the mempool backend is degraded",
    "upstream_recovered": "the mempool backend has recovered",
    "upstream_sequence_gap": "messages from the mempool backend were missed",
    "upstream_message_skipped": "a message from the mempool backend cannot be read and was skipped",
    "upstream_message_parts_skipped": "parts of a message from the mempool backend cannot be read and were skipped",
    "upstream_message_keys_unknown": "a message from the mempool backend has unknown keys",
    "upstream_projected_block_missing": "the mempool backend did not send a projected block: transactions that are in "
    "none of the earlier ones are requested one by one",
    "upstream_capabilities_missing": "the mempool backend does not provide everything that whaled needs",
    "upstream_capabilities_complete": "the mempool backend provides everything that whaled needs",
    "upstream_clock_skewed": "the clocks of this machine and of the mempool backend differ: check the time "
    "synchronisation of both; tokens and timestamps follow the clock of this machine",
    "network_recorded": "the network of the mempool backend is recorded in the event log",
    "network_record_unreadable": "the record of the network in the event log cannot be read and is written again",
    # Backfill
    "backfill_request_failed": "a request of the backfill failed: gaps stay open until it succeeds",
    "backfill_requests_resumed": "the mempool backend responds to the backfill again",
    "backfill_whale_missed": "a whale left the mempool before the backend returned it: it is not alerted",
    "block_scan_start_set": "first start: blocks are scanned from this height on",
    "block_scan_start_lost": "the stored height of the first block to scan is lost: blocks are scanned from this "
    "height on",
    "block_scan_started": "scanning the blocks since the last scan",
    "block_scan_finished": "all blocks since the last scan are scanned",
    "block_scan_blocks_skipped": "blocks further back than backfill.max_blocks are not scanned",
    "chain_reorganised": "blocks left the chain: confirmations in them are undone",
    # Event log
    "eventlog_created": "event log created",
    "eventlog_migration_started": "migrating the event log to a newer schema",
    "eventlog_migrated": "event log migrated to a newer schema",
    "eventlog_opened": "event log opened",
    "eventlog_backup_adopted": "the event log is a backup put in place: a new epoch begins, earlier positions are no "
    "longer valid",
    "eventlog_check_unfinished": "the check of the event log at the start ended before it was complete: the file is "
    "large",
    "eventlog_rows_damaged": "damaged rows in the event log are skipped: clients that request them are informed that "
    "events are missing; `whaled check --deep` lists all of them, `whaled repair` removes them",
    "eventlog_checkpoint_failed": "cannot checkpoint the event log: the next commit tries again",
    "eventlog_close_checkpoint_failed": "cannot checkpoint the event log at its close: the next start reads the "
    "write-ahead log",
    "retention_suspended": "the clock is far ahead of the newest scanned block: events are kept until a block proves "
    "that they are old",
    # Clients
    "client_connected": "client connected",
    "client_disconnected": "client disconnected",
    "client_shed": "client disconnected to save memory",
    "client_failed": "a bug ended the connection of a client",
    "authentication_refused": "authentication refused",
    "token_family_ended": "a token was refreshed twice, so its family ended: issue a new token, or one for each client",
    "system_clock_stepped": "the system clock was set: checking again which tokens have expired",
    "proxy_header_refused": "a trusted proxy sent no readable header with the client's address",
    "origin_refused": "a web page may not connect: its origin is not in gateway.origins",
    "connections_refused": "connections refused",
    "accept_paused": "no new connections are accepted for now: no descriptor or memory is free",
    "accept_resumed": "new connections are accepted again",
    "http_accept_failed": "cannot accept an HTTP connection: no descriptor or memory is free",
    # Admin API
    "admin_ready": "the admin API listens",
    "admin_socket_unavailable": "the admin API has no socket: `whaled status` and its relatives do not work until "
    "admin.socket names a place for it",
    "admin_act_finished": "an act of the admin API has ended",
    "admin_call_refused": "a user may not use the admin API",
    "admin_call_failed": "a bug ended a call of the admin API",
    # Health
    "canary_late": "a canary is late: alerts are late as well",
    "canary_failed": "a canary failed",
    "canary_listener_bypassed": "canaries cannot connect through the listener and use another connection",
    "canary_listener_restored": "canaries connect through the listener again",
    "watchdog_ping_withheld": "no ping is sent to the watchdog: systemd restarts whaled unless it recovers",
    "load_shedding_started": "memory is short: load shedding has started",
    "load_shedding_ended": "memory is no longer short: load shedding has ended",
    # The log itself
    "log_lines_suppressed": "lines of one event were left out",
    "log_entries_lost": "log entries lost: neither the journal nor stderr took them in time",
    # Simulator
    "simulator_started": "simulated mempool backend started",
    "simulator_fault_applied": "simulated fault",
    "simulator_log_removed": "the event log of an earlier simulated world was removed",
}
