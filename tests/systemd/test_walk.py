"""whaled's operation under a booted systemd. Each test leaves whaled running for the next one."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from kit.books import book
from systemd.installation import CONFIG, FAULTS, KEY_RING, OWN, QUICK, TOKEN_FILE, UNITS, URL, Installation, Program
from systemd.lab import Lab

pytestmark = pytest.mark.timeout(180)

WATCHDOG_S = 3
# The time from the last ping: the canary's deadline, the watchdog's timeout, and the start.
WATCHDOG_LIMIT_S = 30
WARNING = 4
READ = "import sys; print(open(sys.argv[1]).read())"
LISTENING = "0A"  # in /proc/net/tcp
FAULTY = f"""[Service]
WatchdogSec={WATCHDOG_S}
Environment=PYTHONPATH={FAULTS}
"""
MEMORY_LIMIT = 128 * 1024**2
ROOM = 6_000_000  # bytes, for about a thousand clients
SHEDDING = "whaled_memory_shedding"
REFUSED_FOR_MEMORY = 'whaled_connections_refused_total{reason="memory"}'
RELOADED = "whaled_config_last_reload_successful"
UNPLANNED = 'whaled_starts_total{after="unclean"}'
ADDRESS_BOOK = "/etc/whaled/book.csv"


@pytest.fixture(scope="session")
def installation(installed: Lab) -> Iterator[Installation]:
    """Return the installed whaled; after all tests, check that its journal contains no secret."""
    installation = Installation(installed)
    yield installation
    # The export format writes the length of a field with a line break as bytes that need not be UTF-8.
    journal = installed.sh("journalctl --output export --all | LC_ALL=C tr -d '\\200-\\377'").stdout
    assert "whaled" in journal
    assert [secret for secret in installation.secrets() if secret in journal] == []


@pytest.fixture
def whaled(installation: Installation) -> Iterator[Installation]:
    """Run whaled with the shared configuration, connected to a backend with frequent whales."""
    installation.reset()
    yield installation
    installation.undo_drop_in()


def offsets(lines: list[dict[str, Any]]) -> list[int]:
    return [line["offset"] for line in lines if line["kind"] in {"alert", "update"}]


# --- normal operation ---


def test_start_returns_when_it_is_ready(whaled: Installation, lab: Lab) -> None:
    assert lab.show("whaled", "Type") == {"Type": "notify"}
    since = lab.moment()
    lab.systemctl("restart", "whaled")
    health = whaled.get("http://127.0.0.1:9108/healthz")
    assert '"ok"' in health
    lines = lab.journal("whaled", since)
    ready = next(number for number, line in enumerate(lines) if line.get("WHALED_EVENT") == "daemon_ready")
    assert ready < next(number for number, line in enumerate(lines) if line["MESSAGE"].startswith("Started "))


def test_metrics_are_scraped_over_http(whaled: Installation) -> None:
    metrics = whaled.metrics()
    assert metrics['whaled_upstream_state{state="connected"}'] == 1
    assert metrics["whaled_authentication_disabled"] == 0
    assert metrics["whaled_signing_keys"] >= 1
    # The sandbox hides most of /proc, but the process collector must still find these.
    assert metrics["process_resident_memory_bytes"] > 10e6
    assert metrics["process_open_fds"] > 5
    assert 0 < time.time() - metrics["process_start_time_seconds"] < 600


def test_a_whale_is_delivered_only_with_a_valid_token(whaled: Installation, lab: Lab) -> None:
    client = whaled.follow()
    txid = whaled.send_whale(12_345.0)
    alert = client.until("alert", txid=txid)[0]
    assert alert["btc"] == 12_345.0
    client.stop()
    lab.write(f"{OWN}/forged", whaled.token[:-8] + "AAAAAAAA", 0o600)
    denied = lab.run("whaled", "tail", "--url", URL, "--token-file", f"{OWN}/forged", "--no-retry", check=False)
    assert denied.returncode == 1
    assert denied.stdout == ""


def test_canaries_arrive_and_reach_no_client(whaled: Installation, lab: Lab) -> None:
    client = whaled.follow()
    before = whaled.metrics()["whaled_canary_seconds_count"]
    lab.until(lambda: whaled.metrics()["whaled_canary_seconds_count"] >= before + 3, what="three canaries")
    assert whaled.metrics()['whaled_canaries_failed_total{reason="late"}'] == 0
    seen = offsets(client.stop())
    assert seen == list(range(seen[0], seen[0] + len(seen)))  # a canary would have taken an offset
    truth = whaled.get("http://127.0.0.1:8999/simulator/truth?whales=1")
    assert all(line["txid"] in truth for line in client.lines("alert"))


def test_the_status_shows_upstream_clients_last_whale_and_offset(whaled: Installation, lab: Lab) -> None:
    client = whaled.follow()
    client.until("alert")
    expected = (
        r"upstream connected; 1 clients?; last whale \d{4}-\d\d-\d\dT[\d:]+Z [\d.]+ BTC; offset [1-9]\d*; "
        r"clients connect to 127\.0\.0\.1:\d+"
    )
    lab.until(lambda: re.fullmatch(expected, whaled.status_text()), what=f"{whaled.status_text()} like {expected}")
    assert whaled.status_text() in lab.systemctl("status", "whaled").stdout
    client.stop()
    lab.systemctl("stop", "simulator")
    lab.until(
        lambda: whaled.status_text().startswith("upstream disconnected; 0 clients"), what="the news in the status"
    )


# --- secrets ---


def test_the_key_ring_is_readable_for_root_and_the_service_only(whaled: Installation, lab: Lab) -> None:
    assert lab.run("stat", "--format", "%a %U %G", KEY_RING).stdout.split() == ["640", "root", "whaled-keys"]
    assert lab.run("getent", "group", "whaled-keys").stdout.strip().endswith(":")  # nobody else is in it
    other = lab.run(
        "systemd-run", "--wait", "--pipe", "--quiet", "--property=DynamicUser=yes", "cat", KEY_RING, check=False
    )
    assert other.returncode != 0
    assert "secret" not in other.stdout
    pid = str(whaled.main_pid())
    user = lab.run("awk", "/^Uid:/ {print $2}", f"/proc/{pid}/status").stdout.strip()
    assert user != "0"
    group = lab.run("getent", "group", "whaled-keys").stdout.split(":")[2]
    # Without the group, the user that the daemon has is not enough.
    as_user = ("nsenter", "--target", pid, "--mount", "--setuid", user, "--setgid")
    read = ("/usr/bin/python3", "-c", READ, KEY_RING)
    assert '"secret"' in lab.run(*as_user, group, *read).stdout
    assert lab.run(*as_user, user, *read, check=False).returncode != 0


# --- reload ---


def test_a_good_reload_is_in_force_and_a_bad_one_changes_nothing(whaled: Installation, lab: Lab) -> None:
    client = whaled.follow()
    pid = whaled.main_pid()
    whaled.configure(detection={"threshold_btc": 20_000.0})
    lab.systemctl("reload", "whaled")
    assert whaled.metrics()[RELOADED] == 1  # `systemctl reload` returns when the new configuration is in force
    small, large = whaled.send_whale(15_000.0), whaled.send_whale(25_000.0)
    client.until("alert", txid=large)
    assert small not in {line["txid"] for line in client.lines("alert")}

    whaled.configure(detection={"threshold_btcs": 5.0})
    refused = lab.systemctl("reload", "whaled", check=False)
    assert refused.returncode == 1
    assert lab.show("whaled", "ReloadResult", "ActiveState") == {"ReloadResult": "exit-code", "ActiveState": "active"}
    assert f"{CONFIG}:" in lab.systemctl("status", "whaled").stdout

    whaled.signal("HUP")  # without the check before the reload, the daemon itself refuses the configuration
    lab.until(lambda: whaled.metrics()[RELOADED] == 0, what="a refused reload in the metrics")
    small, large = whaled.send_whale(15_000.0), whaled.send_whale(25_000.0)
    client.until("alert", txid=large)
    assert small not in {line["txid"] for line in client.lines("alert")}

    whaled.configure()
    lab.systemctl("reload", "whaled")
    lab.until(lambda: whaled.metrics()[RELOADED] == 1, what="a reload in the metrics")
    client.until("alert", txid=whaled.send_whale(15_000.0))
    assert whaled.main_pid() == pid
    assert [line["kind"] for line in client.stop() if line["kind"] == "disconnected"] == []


def test_a_reload_of_a_key_that_cannot_change_is_refused_by_the_daemon(whaled: Installation, lab: Lab) -> None:
    since = lab.moment()
    whaled.configure(eventlog={"path": "/var/lib/whaled/other.db"})  # the configuration file itself is valid
    refused = lab.systemctl("reload", "whaled", check=False)
    assert refused.returncode == 1
    assert lab.show("whaled", "ReloadResult", "ActiveState") == {"ReloadResult": "exit-code", "ActiveState": "active"}
    lab.until(lambda: whaled.metrics()[RELOADED] == 0, what="a refused reload in the metrics")
    messages = [str(line["MESSAGE"]) for line in lab.journal("whaled", since)]
    assert (
        "whaled: reload refused, the old configuration stays: eventlog.path: cannot change while running: "
        "restart whaled to change it" in messages
    )
    lab.until(lambda: whaled.status_text().endswith("; the last reload was refused"), what=whaled.status_text())
    whaled.configure()
    lab.systemctl("reload", "whaled")
    assert whaled.metrics()[RELOADED] == 1
    lab.until(lambda: "reload" not in whaled.status_text(), what=whaled.status_text())


def test_a_large_address_book_is_read_by_a_process_of_the_sandbox(whaled: Installation, lab: Lab) -> None:
    lab.write(ADDRESS_BOOK, "\n".join(book(5_000)))
    whaled.configure(detection={"address_book": ADDRESS_BOOK})
    lab.systemctl("reload", "whaled")
    assert whaled.metrics()[RELOADED] == 1
    assert whaled.metrics()["whaled_address_book_addresses"] == 5_000
    lab.systemctl("restart", "whaled")
    assert whaled.metrics()["whaled_address_book_addresses"] == 5_000


# --- restarts ---


def test_a_killed_daemon_is_restarted_and_a_client_misses_nothing(whaled: Installation, lab: Lab) -> None:
    client = whaled.follow()
    client.until("alert", count=10)
    lab.systemctl("restart", "whaled")  # planned
    restarts, unplanned = whaled.restarts(), whaled.metrics()[UNPLANNED]
    client.until("connected", count=2)
    whaled.signal("KILL")
    client.until("connected", count=3)
    before = len(client.lines("alert"))
    client.until("alert", count=before + 10)
    assert whaled.restarts() == restarts + 1
    assert whaled.metrics()[UNPLANNED] == unplanned + 1
    assert "last whale 20" in whaled.status_text()
    lines = client.stop()
    seen = offsets(lines)
    assert seen == list(range(seen[0], seen[0] + len(seen)))
    assert {line["epoch"] for line in lines if "epoch" in line} == {lines[1]["epoch"]}
    assert [line for line in lines if line["kind"] == "missed"] == []


@pytest.fixture
def faulty(whaled: Installation) -> Installation:
    """Run whaled with a short watchdog timeout, and with signals that inject faults."""
    whaled.drop_in(FAULTY)
    whaled.lab.systemctl("restart", "whaled")
    assert whaled.lab.show("whaled", "WatchdogUSec") == {"WatchdogUSec": f"{WATCHDOG_S}s"}
    return whaled


@pytest.mark.parametrize(
    "signal",
    [
        pytest.param("RTMIN+2", id="blocked event loop"),
        pytest.param("RTMIN+3", id="hung writer thread"),
        pytest.param("RTMIN+1", id="wedged hub"),
    ],
)
def test_a_fault_that_stops_alerts_ends_in_a_watchdog_restart(faulty: Installation, lab: Lab, signal: str) -> None:
    lab.until(lambda: faulty.metrics()["whaled_canary_seconds_count"] >= 1, what="a canary")
    restarts, since = faulty.restarts(), lab.moment()
    faulty.signal(signal)
    lab.until(lambda: faulty.restarts() > restarts, WATCHDOG_LIMIT_S, what="a restart")
    messages = [line["MESSAGE"] for line in lab.journal("whaled", since)]
    assert any("Watchdog timeout" in str(text) for text in messages)
    client = faulty.follow()
    client.until("alert")
    client.stop()


def test_an_unreachable_backend_does_not_cause_a_restart(faulty: Installation, lab: Lab) -> None:
    lab.systemctl("stop", "simulator")
    lab.until(lambda: faulty.metrics()['whaled_upstream_state{state="disconnected"}'], what="a lost backend")
    before, pid = faulty.metrics()["whaled_canary_seconds_count"], faulty.main_pid()
    # Longer than the watchdog's timeout of 3 s: a canary every 0.5 s, and a deadline of 1 s.
    lab.until(lambda: faulty.metrics()["whaled_canary_seconds_count"] >= before + 12, what="canaries that arrive")
    assert faulty.main_pid() == pid
    assert faulty.metrics()['whaled_canaries_failed_total{reason="late"}'] == 0


# --- clients during restarts ---


def test_restarts_refuse_no_client(whaled: Installation, lab: Lab) -> None:
    clients = Program(lab, "knock", URL)
    clients.until("first")
    for _ in range(3):
        lab.systemctl("restart", "whaled")
    assert clients.lines("trouble") == []  # accepted connections were served, the others waited in the backlog
    pid = whaled.main_pid()
    whaled.signal("KILL")
    lab.until(lambda: whaled.main_pid() not in {0, pid} and whaled.is_active("whaled"), what="a restart")
    total = clients.stop()[-1]
    print(total)
    assert total["kind"] == "sum"
    outcomes = total["outcomes"]
    assert outcomes["ok"] > 100
    # A handshake that the killed process was handling is lost; no connection is refused.
    assert {name for name in outcomes if not name.startswith("cut off")} == {"ok"}
    assert total["worst_s"] < 10


def test_a_wrong_configuration_logs_one_clear_line_and_clients_connect_once_it_is_corrected(
    whaled: Installation, lab: Lab
) -> None:
    since = lab.moment()
    wrong = yaml.safe_dump({**QUICK, "detection": {"threshold_btcs": 5}})
    whaled.write_config(wrong)
    lab.systemctl("restart", "whaled", check=False)
    assert not whaled.is_active("whaled")
    assert whaled.is_active("whaled.socket")
    client = Program(lab, "knock", URL, "once")
    client.until("trying")
    line = wrong.splitlines().index("  threshold_btcs: 5") + 1
    clear = f"{CONFIG}:{line}: detection.threshold_btcs: "

    # Between two attempts, which is nearly all the time, systemd shows no log line, only the STATUS= text.
    lab.until(lambda: lab.show("whaled", "SubState") == {"SubState": "auto-restart"}, what="a pause")
    shown = [text.strip() for text in lab.systemctl("status", "whaled", check=False).stdout.splitlines()]
    assert [
        text for text in shown if text.startswith(f'Status: "{clear}') and "did you mean `threshold_btc`" in text
    ], shown
    journal = lab.journal("whaled", since)
    attempts: dict[str, list[str]] = {}
    for entry in journal:
        if clear in str(entry["MESSAGE"]):
            attempts.setdefault(entry["_SYSTEMD_INVOCATION_ID"], []).append(entry["MESSAGE"])
    assert attempts
    assert all(len(lines) == 1 for lines in attempts.values())
    assert client.lines("once") == []  # still waiting
    whaled.configure()  # systemd restarts whaled without another command
    assert client.until("once")[0]["outcome"] == "ok"
    assert whaled.is_active("whaled")


def test_a_stopped_daemon_leaves_nothing_behind(whaled: Installation, lab: Lab) -> None:
    client, since = whaled.follow(), lab.moment()
    lab.systemctl("stop", *UNITS)
    assert client.until("disconnected")[0]["code"] == 1012
    client.stop()
    assert lab.show("whaled", "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    messages = [str(line["MESSAGE"]) for line in lab.journal("whaled", since)]
    assert any("Deactivated successfully" in line for line in messages)  # logged only for exit status 0
    assert not any("exited" in line or "timed out" in line for line in messages)
    assert lab.show("whaled.socket", "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    sockets = [line.split() for line in lab.path("/proc/1/net/tcp").read_text().splitlines()[1:]]
    listening = {int(local.rpartition(":")[2], 16) for _, local, _, state, *_ in sockets if state == LISTENING}
    assert not {8765, 9108} & listening
    assert not lab.path("/sys/fs/cgroup/system.slice/whaled.service").exists()
    assert lab.run("whaled", "check-config").returncode == 0


# --- the journal ---


def test_the_journal_has_priorities_and_fields(whaled: Installation, lab: Lab) -> None:
    since = lab.moment()
    client = whaled.follow()
    txid = whaled.send_whale(2_345.0)
    client.until("alert", txid=txid)
    client.stop()
    whaled.write_config("detection: {threshold_btcs: 5}\n")
    whaled.signal("HUP")
    lab.until(lambda: whaled.metrics()[RELOADED] == 0, what="a refused reload")
    (whale,) = lab.journal("whaled", since, f"WHALED_TXID={txid}", "WHALED_BTC=2345.0")
    assert (whale["PRIORITY"], whale["SYSLOG_IDENTIFIER"]) == ("6", "whaled")
    warnings = lab.journal("whaled", since, "--priority", "warning")
    assert warnings
    assert all(int(line["PRIORITY"]) <= WARNING for line in warnings)
    refused = [line for line in warnings if line.get("WHALED_EVENT") == "reload_refused"]
    assert [line["PRIORITY"] for line in refused] == ["3"]
    assert "threshold_btc" in refused[0]["WHALED_PROBLEM"]


# --- memory ---


def test_near_its_memory_limit_it_refuses_new_clients_and_survives(whaled: Installation, lab: Lab) -> None:
    client = whaled.follow()
    pid = whaled.main_pid()
    used = whaled.metrics()["whaled_memory_used_bytes"]
    whaled.configure(memory={"limit": f"{MEMORY_LIMIT}B", "shed_at": round((used + ROOM) / MEMORY_LIMIT, 3)})
    lab.systemctl("reload", "whaled")
    lab.until(lambda: whaled.metrics()["whaled_memory_limit_bytes"] == MEMORY_LIMIT, what="the limit in the metrics")
    assert whaled.metrics()[SHEDDING] == 0
    flood = Program(lab, "flood", URL, TOKEN_FILE, "6000")
    lab.until(lambda: whaled.metrics().get(REFUSED_FOR_MEMORY), what="a refusal for memory")
    assert whaled.metrics()[SHEDDING] == 1
    assert flood.until("all", timeout=60)[0]["answers"]["503"] > 0
    client.until("alert", txid=whaled.send_whale(3_456.0))
    after = whaled.metrics()
    print({name: after[name] for name in after if "memory" in name or "shed" in name}, flood.lines("all"))
    assert after["whaled_memory_used_bytes"] < MEMORY_LIMIT
    assert whaled.main_pid() == pid
    flood.stop()
    assert [line for line in client.stop() if line["kind"] == "disconnected"] == []


# --- unauthenticated clients ---


def test_unauthenticated_connections_that_use_all_descriptors_stop_nothing(whaled: Installation, lab: Lab) -> None:
    whaled.drop_in("[Service]\nLimitNOFILE=512\n")
    lab.systemctl("restart", "whaled")
    client, pid, since = whaled.follow(), whaled.main_pid(), lab.moment()
    for port in ("8765", "9108"):
        silent = Program(lab, "silent", port, "4000")
        silent.until("all")
        client.until("alert", txid=whaled.send_whale(4_567.0))
        new_client = Program(lab, "flood", URL, TOKEN_FILE, "1")
        assert new_client.until("all")[0]["answers"] == {"101": 1}
        new_client.stop()
        silent.stop()
    assert [line for line in client.stop() if line["kind"] == "disconnected"] == []
    assert whaled.main_pid() == pid
    assert [line["MESSAGE"] for line in lab.journal("whaled", since) if "Traceback" in line["MESSAGE"]] == []
