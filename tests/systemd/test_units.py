"""The units: the operations that the sandbox allows and refuses, their exposure, installation and removal."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

from systemd.installation import CONFIG, KEY_RING, OWN, PYTHON, WHALED, Program
from systemd.lab import Lab

pytestmark = pytest.mark.timeout(180)

UNITS = "/etc/systemd/system"
DROP_INS = f"{UNITS}/whaled.service.d"
SHARE = "/opt/whaled/share/systemd"
OURS = ("whaled.service", "whaled.socket", "whaled-metrics.socket", "whaled-egress.service", "whaled-egress.socket")
SPLIT = "50-egress-split.conf"
ROOT = "70-rootdir.conf"
VARIANTS = {"base": (), "split": (SPLIT,), "root": (SPLIT, ROOT)}
BACKOFF_SINCE = 254
ELSEWHERE = "203.0.113.10"  # TEST-NET-3, unassigned; here an address of the lab's loopback
EGRESS = "/run/whaled-egress.sock"
INSTALL_LIMIT_S = 120
DISPLACED = 'whaled_connections_refused_total{reason="displaced"}'
SILENT_LIMIT_KIB = 150 * 1024

ALLOWED = (
    "event_log", "temporary_file", "threads", "tls_roots", "resolver", "signatures", "whole_program", "key_ring",
    "journal", "notify", "give_memory_back", "own_numbers", "own_cgroup", "client",
)  # fmt: skip
# The error shows the mechanism that refuses. EROFS: read-only for every user, not only for this one.
EXECUTABLE_MEMORY = "EPERM or EACCES"  # a system call filter, or the kernel (PR_SET_MDWE) if systemd supports it
REFUSED = {
    "shell": "EACCES",
    "program": "EACCES",
    "program in state": "EACCES",
    "program in /tmp": "EACCES",
    "program in /var/tmp": "EACCES",
    "program in /dev/shm": "EACCES",
    "program in /run": "EROFS",
    "library in state": "EPERM",
    "memory as file": "EPERM",
    "write and execute": EXECUTABLE_MEMORY,
    "write, then execute": EXECUTABLE_MEMORY,
    "raw socket": "EPERM",
    "netlink socket": "EAFNOSUPPORT",
    "packet socket": "EAFNOSUPPORT",
    "crypto socket": "EAFNOSUPPORT",
    "namespace": "EPERM",
    "mount": "EPERM",
    "change of root": "EPERM",
    "real-time priority": "EPERM",
    "niceness": "EPERM",
    "personality": "EPERM",
    "clock": "EPERM",
    "host name": "EPERM",
    "set-uid file": "EPERM",
    "kernel log": "ENOENT",
    "write to /etc": "EROFS",
    "write to /etc/whaled": "EROFS",
    "write to /run": "EROFS",
    "write to /opt/whaled": "EROFS",
    "write to the program": "EROFS",
    "write to libraries": "EROFS",
    "write to cgroup": "EROFS",
    "homes": "EACCES",
    "another process": "ENOENT",
    "the system's numbers": "ENOENT",
    "write to the key ring": "EROFS or EACCES",
    "connection elsewhere": "TimeoutError",
}
# Without a network these socket families are not available.
REFUSED_SPLIT = {
    "raw socket": "EAFNOSUPPORT",
    "connection elsewhere": "EAFNOSUPPORT",
    "connection here": "EAFNOSUPPORT",
}


# --- helpers ---


def systemd_version(lab: Lab) -> int:
    return int(lab.systemctl("--version").stdout.split()[1])


def controls_memory(lab: Lab) -> bool:
    return "memory" in lab.path("/sys/fs/cgroup/cgroup.controllers").read_text().split()


@contextmanager
def dropped_in(lab: Lab, *names: str) -> Iterator[None]:
    """Enable shipped drop-ins as their comments describe."""
    lab.run("mkdir", "-p", DROP_INS)
    for name in names:
        lab.run("ln", "-s", f"{SHARE}/{name}", f"{DROP_INS}/{name}")
    lab.systemctl("daemon-reload")
    try:
        yield
    finally:
        lab.run("rm", "-f", *(f"{DROP_INS}/{name}" for name in names))
        lab.systemctl("daemon-reload")


def exposure(lab: Lab, unit: str) -> float:
    output = lab.run("systemd-analyze", "security", "--no-pager", unit).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", output)
    assert found, output
    print(f"systemd {systemd_version(lab)}: {unit} {found[1]}")
    return float(found[1])


def probe_unit(text: str) -> str:
    """Return one of whaled's units with only the names changed, so that it can run at the same time as whaled."""
    text = re.sub(r"^((Requires|After|Sockets)=.*?) ?whaled-metrics\.socket", r"\1", text, flags=re.MULTILINE)
    text = text.replace("whaled.socket", "whaled-probe.socket").replace(
        "StateDirectory=whaled\n", "StateDirectory=whaled-probe\n"
    )
    return re.sub(r"/var/lib/(private/)?whaled\b", r"/var/lib/\1whaled-probe", text)


@cache
def probed(lab: Lab, variant: str) -> dict[str, Any]:
    """Return the probe's results in the sandbox of the installed unit."""
    units = "/run/systemd/system"
    lab.write(f"{units}/whaled-probe.service", probe_unit(lab.path(f"{UNITS}/whaled.service").read_text()))
    for name in VARIANTS[variant]:
        lab.write(f"{units}/whaled-probe.service.d/{name}", probe_unit(lab.path(f"{SHARE}/{name}").read_text()))
    program = (lab.project / "tests" / "systemd" / "programs" / "probe.py").read_text()
    place = "/opt/whaled" if variant == "root" else OWN  # with RootDirectory= the sandbox does not contain OWN
    lab.write(f"{place}/probe.py", program)
    lab.write(
        f"{units}/whaled-probe.service.d/99-probe.conf",
        "[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nExecStartPre=\nExecReload=\nExecStart=\n"
        f"ExecStart={PYTHON} -P {place}/probe.py {ELSEWHERE} {EGRESS}\n",
    )
    listener = lab.path(f"{UNITS}/whaled.socket").read_text().replace("127.0.0.1:8765", "0.0.0.0:18765")
    lab.write(f"{units}/whaled-probe.socket", listener)
    lab.systemctl("daemon-reload")
    lab.run("rm", "-f", "/var/lib/private/whaled-probe/result.json")
    if ELSEWHERE not in lab.run("ip", "address", "show", "lo").stdout:
        lab.run("ip", "address", "add", f"{ELSEWHERE}/32", "dev", "lo")
    listen = "import socket, time; s = socket.create_server(('0.0.0.0', 18999)); time.sleep(600)"
    lab.run("systemd-run", "--quiet", "--collect", "--unit", "lab-elsewhere", PYTHON, "-c", listen)
    lab.systemctl("start", "whaled-egress.socket", "whaled-probe.socket")
    try:
        # A client from that address; its connection starts the service.
        connect = "import socket, sys; socket.create_connection((sys.argv[1], 18765), 20, (sys.argv[1], 0)).recv(9)"
        greeted = lab.run(PYTHON, "-c", connect, ELSEWHERE, check=False)
        result = lab.path("/var/lib/private/whaled-probe/result.json")
        lab.until(
            lambda: "activ" not in lab.show("whaled-probe", "ActiveState")["ActiveState"][:5], 30, "the probe's end"
        )
        if not result.exists():
            log = [line["MESSAGE"] for line in lab.journal("whaled-probe")][-12:]
            raise AssertionError(f"no result: {log} {greeted}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    finally:
        lab.systemctl(
            "stop",
            "lab-elsewhere",
            "whaled-probe.socket",
            "whaled-probe.service",
            "whaled-egress.socket",
            "whaled-egress.service",
        )
        lab.run(
            "rm",
            "-rf",
            f"{units}/whaled-probe.service.d",
            f"{units}/whaled-probe.service",
            f"{units}/whaled-probe.socket",
            f"{place}/probe.py",
        )
        lab.systemctl("daemon-reload")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sandbox(installed: Lab, variant: str) -> dict[str, Any]:
    return probed(installed, variant)


@pytest.fixture
def stopped(installed: Lab) -> Iterator[Lab]:
    """Stop whaled before and after the test."""
    installed.systemctl("stop", *OURS, check=False)
    yield installed
    installed.systemctl("stop", *OURS, check=False)
    installed.systemctl("reset-failed", check=False)


def make(lab: Lab, *argv: str, check: bool = True) -> str:
    """Run `make` with the existing wheels, and return its output."""
    command = ("make", "-C", str(lab.project), "--old-file=dist/wheels", *argv)
    done = lab.run(*command, check=check, timeout=INSTALL_LIMIT_S)
    return done.stdout + done.stderr


# --- sandbox ---


def test_the_sandbox_allows_every_operation_that_whaled_needs(sandbox: dict[str, Any], variant: str) -> None:
    expected = (*ALLOWED, "backend_here" if variant == "base" else "way_out")
    assert {name: sandbox["allowed"][name] for name in expected} == dict.fromkeys(expected, "done")


@pytest.mark.parametrize("attempt", REFUSED)
def test_sandbox_refuses(sandbox: dict[str, Any], variant: str, attempt: str) -> None:
    how = REFUSED[attempt] if variant == "base" else REFUSED_SPLIT.get(attempt, REFUSED[attempt])
    expected = how.split(" or ")
    if variant == "root":
        expected.append("ENOENT")  # the root directory does not contain the file
    assert sandbox["refused"][attempt] in expected


def test_nothing_is_writable_and_executable(sandbox: dict[str, Any]) -> None:
    assert sandbox["facts"]["writable and executable"] == []


def test_no_other_process_is_visible_and_no_privilege_can_be_gained(sandbox: dict[str, Any]) -> None:
    assert sandbox["facts"]["processes"]
    status = sandbox["facts"]["status"]
    assert {
        name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    } == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "0" not in status["Uid"].split()
    assert status["Umask"] == "0077"


def test_without_a_network_only_the_egress_socket_is_reachable(installed: Lab) -> None:
    for name in ("connection here", "connection elsewhere"):
        assert probed(installed, "split")["refused"][name] == "EAFNOSUPPORT"
    assert probed(installed, "split")["allowed"]["way_out"] == "done"


def test_only_the_configured_ports_can_be_bound(installed: Lab) -> None:
    if "-BPF_FRAMEWORK" in installed.systemctl("--version").stdout:
        pytest.skip("this systemd is built without BPF_FRAMEWORK: SocketBindDeny= does nothing, silently")
    assert probed(installed, "base")["refused"]["port of its own"] == "EPERM"


def test_memory_limit_is_what_the_daemon_reads(installed: Lab) -> None:
    if not controls_memory(installed):
        pytest.skip("no memory controller in this cgroup tree: MemoryMax= does nothing here")
    assert probed(installed, "base")["facts"]["memory.max"] == str(1024**3)


# --- exposure ---


def test_units_are_valid(installed: Lab) -> None:
    for unit in OURS:
        verified = installed.run("systemd-analyze", "verify", f"{UNITS}/{unit}")
        assert "whaled" not in verified.stderr, verified.stderr


@pytest.mark.parametrize("names", [(SPLIT,), (SPLIT, ROOT), ("20-remote-upstream.conf",), ("30-tls.conf",)], ids=str)
def test_drop_ins_are_valid(installed: Lab, names: tuple[str, ...]) -> None:
    with dropped_in(installed, *names):
        verified = installed.run("systemd-analyze", "verify", f"{UNITS}/whaled.service")
        assert "whaled" not in verified.stderr, verified.stderr
        assert all(name in installed.show("whaled", "DropInPaths")["DropInPaths"] for name in names)


def test_the_backoff_drop_in_is_valid_where_systemd_supports_it(installed: Lab) -> None:
    if systemd_version(installed) < BACKOFF_SINCE:
        pytest.skip(f"RestartSteps= requires systemd {BACKOFF_SINCE}; this is {systemd_version(installed)}")
    with dropped_in(installed, "60-backoff-254.conf"):
        verified = installed.run("systemd-analyze", "verify", f"{UNITS}/whaled.service")
        assert "whaled" not in verified.stderr, verified.stderr


@pytest.mark.parametrize(
    ("names", "most"),
    [((), 1.0), (("20-remote-upstream.conf",), 1.1), (("30-tls.conf",), 1.0), ((SPLIT,), 0.3), ((SPLIT, ROOT), 0.2)],
    ids=str,
)
def test_exposure_is_at_most(installed: Lab, names: tuple[str, ...], most: float) -> None:
    with dropped_in(installed, *names):
        assert exposure(installed, "whaled.service") <= most


def test_exposure_of_the_proxy_is_at_most_one(installed: Lab) -> None:
    assert exposure(installed, "whaled-egress.service") <= 1.0


# --- properties that no probe checks ---


def test_systemd_waits_for_readiness_and_never_stops_restarting(installed: Lab) -> None:
    shown = installed.show(
        "whaled", "Type", "Restart", "StartLimitIntervalUSec", "RestartPreventExitStatus", "OOMPolicy"
    )
    assert shown == {
        "Type": "notify",  # systemd 252 treats notify-reload as `simple`
        "Restart": "always",
        "StartLimitIntervalUSec": "0",
        "RestartPreventExitStatus": "",
        "OOMPolicy": "stop",
    }
    for unit in ("whaled.socket", "whaled-metrics.socket", "whaled-egress.socket"):
        assert installed.show(unit, "TriggerLimitIntervalUSec") == {"TriggerLimitIntervalUSec": "0"}


def test_denied_system_calls_are_denied(installed: Lab) -> None:
    """`~` has its meaning only at the start of a line: elsewhere the system call would silently be allowed."""
    allowed = set(installed.show("whaled", "SystemCallFilter")["SystemCallFilter"].split())
    assert {"read", "epoll_wait", "futex"} <= allowed
    assert (
        not {"memfd_create", "setpriority", "sched_setscheduler", "chroot", "mount", "ptrace", "bpf", "reboot"}
        & allowed
    )


def test_memory_high_is_just_below_memory_max(installed: Lab) -> None:
    """Between MemoryHigh= and MemoryMax= a process without swap slows down until the watchdog ends it."""
    shown = installed.show("whaled", "MemoryHigh", "MemoryMax", "MemorySwapMax")
    assert 0.9 * int(shown["MemoryMax"]) <= int(shown["MemoryHigh"]) <= int(shown["MemoryMax"])
    assert shown["MemorySwapMax"] == "0"


def test_systemd_manages_only_the_state_directory(installed: Lab) -> None:
    shown = installed.show("whaled", "ConfigurationDirectory", "RuntimeDirectory", "StateDirectory")
    assert shown == {"ConfigurationDirectory": "", "RuntimeDirectory": "", "StateDirectory": "whaled"}


def test_everything_is_compiled_at_installation(installed: Lab) -> None:
    """The daemon cannot write compiled code, and would otherwise compile at every start."""
    assert "PYTHONDONTWRITEBYTECODE=1" in installed.show("whaled", "Environment")["Environment"]
    site = "/opt/whaled/venv/lib/python3.*/site-packages/whaled"
    sources, compiled = (int(installed.sh(f"find {site} -name '*.{kind}' | wc -l").stdout) for kind in ("py", "pyc"))
    assert sources == compiled > 50


def test_without_its_key_ring_it_does_not_start(stopped: Lab) -> None:
    stopped.run("mv", KEY_RING, f"{KEY_RING}.away")
    try:
        assert stopped.systemctl("start", "whaled.service", check=False).returncode != 0
        journal = [str(line["MESSAGE"]) for line in stopped.journal("whaled.service", "--lines", "30")]
        assert any("there is no key ring" in text for text in journal), journal
        assert stopped.show("whaled.socket", "ActiveState") == {"ActiveState": "active"}  # clients wait for the start
    finally:
        stopped.run("mv", f"{KEY_RING}.away", KEY_RING)
    stopped.until(lambda: stopped.show("whaled", "ActiveState")["ActiveState"] == "active", what="a start by itself")


def test_a_stop_of_the_service_alone_leaves_the_socket_that_starts_it_again(stopped: Lab) -> None:
    stopped.write(CONFIG, "{}\n")
    stopped.systemctl("start", "whaled")
    assert stopped.run("ss", "-Hltn", "sport = :8765").stdout.split()[2] == "4096"  # the backlog; asyncio's is 100
    assert stopped.show("whaled", "WatchdogUSec") == {"WatchdogUSec": "30s"}
    stopped.systemctl("stop", "whaled.service")
    assert stopped.show("whaled.socket", "ActiveState") == {"ActiveState": "active"}
    stopped.run(PYTHON, "-c", "import socket; socket.create_connection(('127.0.0.1', 8765), 5).close()")
    stopped.until(lambda: stopped.show("whaled", "ActiveState")["ActiveState"] == "active", what="a started whaled")
    stopped.systemctl("stop", "whaled.service", "whaled.socket")
    assert stopped.run("ss", "-Hltn", "sport = :8765").stdout == ""


# --- the running daemon with drop-ins ---


def metric(lab: Lab, name: str) -> str:
    page = lab.run(
        PYTHON,
        "-c",
        "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9108/metrics', None, 5).read().decode())",
        check=False,
    )
    return next((line.rpartition(" ")[2] for line in page.stdout.splitlines() if line.startswith(f"{name} ")), "")


@pytest.mark.parametrize("names", [(SPLIT,), (SPLIT, ROOT)], ids=["split", "split and root"])
def test_without_a_network_whales_still_arrive_and_reload_works(stopped: Lab, names: tuple[str, ...]) -> None:
    stopped.systemctl("stop", "simulator", check=False)
    stopped.run(
        "systemd-run", "--quiet", "--collect", "--unit", "split-backend", WHALED, "simulate", "--port", "8999",
        "--rate", "20", "--whale-share", "0.4", "--poll-interval", "0.2", "--seed", "7",
    )  # fmt: skip
    stopped.write(CONFIG, f"upstream: {{unix_socket: {EGRESS}, reconnect_initial: 100ms, reconnect_max: 300ms}}\n")
    try:
        with dropped_in(stopped, *names):
            stopped.systemctl("start", "whaled")
            stopped.until(lambda: float(metric(stopped, "whaled_alerts_published_total") or 0) > 0, what="an alert")
            pid = stopped.show("whaled", "MainPID")["MainPID"]
            interfaces = [
                line.split(":")[0].strip() for line in stopped.path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
            ]
            assert interfaces == ["lo"]
            stopped.run(WHALED, "keys", "generate")
            before = float(metric(stopped, "whaled_config_last_reload_success_timestamp_seconds"))
            stopped.systemctl("reload", "whaled")
            assert float(metric(stopped, "whaled_config_last_reload_success_timestamp_seconds")) > before
            stopped.write(CONFIG, f"upstream: {{unix_socket: {EGRESS}}}\nbackfill: {{enabled: false}}\n")
            assert stopped.systemctl("reload", "whaled", check=False).returncode == 1
            journal = [str(line["MESSAGE"]) for line in stopped.journal("whaled.service", "--lines", "30")]
            assert any("whaled: reload refused, the old configuration stays: " in text for text in journal), journal
            stopped.systemctl("stop", "split-backend")
            stopped.until(
                lambda: any(
                    f"connected to {EGRESS} (upstream.unix_socket), and the connection ended without an answer"
                    in str(line)
                    for line in stopped.journal("whaled.service", "--lines", "30")
                ),
                what="a dead backend behind the socket",
            )
            proxy = [str(line["MESSAGE"]) for line in stopped.journal("whaled-egress.service", "--lines", "10")]
            assert any("Failed to connect to remote host" in text for text in proxy), proxy
            stopped.systemctl("stop", *OURS)
    finally:
        stopped.systemctl("stop", *OURS, "split-backend", check=False)


def test_a_certificate_only_root_can_read_is_served_and_renewed_by_a_reload(stopped: Lab) -> None:
    def issue(name: str) -> None:
        stopped.sh(
            "umask 077; mkdir -p /etc/whaled/tls; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
            '-subj "/CN=$1" -days 2 -keyout /etc/whaled/tls/privkey.pem -out /etc/whaled/tls/fullchain.pem 2>/dev/null',
            name,
        )

    def served() -> str:
        return stopped.sh("openssl s_client -connect 127.0.0.1:8765 </dev/null 2>/dev/null | grep ^subject=").stdout

    if stopped.run("openssl", "version", check=False).returncode != 0:
        pytest.skip("needs openssl to make a certificate")
    stopped.write(CONFIG, "{}\n")
    issue("first")
    try:
        with dropped_in(stopped, "30-tls.conf"):
            stopped.systemctl("start", "whaled")
            assert "first" in served()
            checked = stopped.run(WHALED, "check-config").stdout
            assert "clients at ws://127.0.0.1:8765. as whaled.service clients at wss://127.0.0.1:8765 (" in checked
            issue("renewed")
            stopped.systemctl("reload", "whaled")
            if systemd_version(stopped) != 252:
                stopped.systemctl("restart", "whaled")
            assert "renewed" in served()
            check_memory_of_silent_connections(stopped)
            assert "renewed" in served()
            stopped.systemctl("stop", *OURS)
    finally:
        stopped.run("rm", "-rf", "/etc/whaled/tls")


def check_memory_of_silent_connections(lab: Lab) -> None:
    """Open 4,500 connections to a TLS port that send nothing, and check the daemon's memory."""
    pid = lab.show("whaled", "MainPID")["MainPID"]
    lab.run("mkdir", "-p", OWN)
    silent = Program(lab, "silent", "8765", "4500")
    silent.until("all")
    lab.until(lambda: float(metric(lab, DISPLACED) or 0) > 0, what="connections above gateway.max_unauthenticated")
    memory = lab.sh('grep ^VmRSS: "/proc/$1/status"', pid).stdout
    silent.stop()
    assert int(memory.split()[1]) < SILENT_LIMIT_KIB, memory
    assert lab.show("whaled", "MainPID")["MainPID"] == pid


# --- installation, upgrade and removal ---


def test_modes_of_configuration_keys_and_units(installed: Lab) -> None:
    modes = installed.run(
        "stat", "--format", "%a %U %n", CONFIG, KEY_RING, *(f"{UNITS}/{unit}" for unit in OURS)
    ).stdout
    assert modes.splitlines() == [
        f"644 root {CONFIG}", f"600 root {KEY_RING}", *(f"644 root {UNITS}/{unit}" for unit in OURS)
    ]  # fmt: skip
    assert installed.run("whaled", "--version").returncode == 0


def test_an_upgrade_keeps_edited_files_and_the_running_version(stopped: Lab) -> None:
    edited = "# mine\ndetection: {threshold_btc: 12.5}\n"
    stopped.write(CONFIG, edited)
    ring = stopped.path(KEY_RING).read_text()
    stopped.systemctl("enable", "--now", "whaled")
    try:
        pid, before = stopped.show("whaled", "MainPID")["MainPID"], stopped.run("readlink", "/opt/whaled/venv").stdout
        output = make(stopped, "install")
        assert "systemctl daemon-reload && systemctl restart whaled" in output
        assert "kept /etc/whaled/whaled.yaml" in output
        assert stopped.path(CONFIG).read_text() == edited
        assert stopped.path(KEY_RING).read_text() == ring
        after = stopped.run("readlink", "/opt/whaled/venv").stdout
        assert before != after
        assert stopped.path(f"/opt/whaled/{before.strip()}/bin/python").is_symlink()  # the running version is kept
        assert stopped.show("whaled", "MainPID", "ActiveState") == {"MainPID": pid, "ActiveState": "active"}
        stopped.systemctl("daemon-reload")
        stopped.systemctl("restart", "whaled")
        running = stopped.path(f"/proc/{stopped.show('whaled', 'MainPID')['MainPID']}/cmdline").read_text()
        assert running.startswith(f"/opt/whaled/{after.strip()}/bin/python\0")

        refused = make(stopped, "uninstall", check=False)
        assert "systemctl disable --now whaled.service" in refused
        assert stopped.show("whaled", "ActiveState") == {"ActiveState": "active"}
        assert stopped.path("/opt/whaled/venvs").is_dir()
    finally:
        stopped.systemctl("disable", "--now", *OURS, check=False)


def test_python_in_a_home_directory_is_refused(installed: Lab) -> None:
    installed.sh('install -D "$(readlink -f /usr/bin/python3)" /root/python/bin/python3')
    output = make(installed, "install", "INSTALL_PYTHON=/root/python/bin/python3", check=False)
    assert "lies in /root/python/bin/python3" in output
    assert "set INSTALL_PYTHON" in output


def test_a_package_contains_no_path_of_its_build_directory(installed: Lab) -> None:
    place = f"{OWN}/package"
    target = (f"DESTDIR={place}", "PREFIX=/usr/lib/whaled", "UNITDIR=/usr/lib/systemd/system")
    output = make(installed, "install", *target)
    assert "no key ring made under DESTDIR" in output  # every user of the package would have the same keys
    assert not installed.path(f"{place}{KEY_RING}").exists()
    inside = installed.run("grep", "-rlI", "--exclude=RECORD", place, place, check=False).stdout
    assert inside == ""
    scripts = installed.sh(
        'head -qn1 "$1"/usr/lib/whaled/venvs/*/bin/whaled "$1"/usr/lib/whaled/venvs/*/bin/pip', place
    ).stdout
    assert re.fullmatch(r"(#!/usr/lib/whaled/venvs/[^/]+/bin/python[\d.]*\n){2}", scripts)
    rules = installed.path(f"{place}/usr/lib/whaled/share/prometheus/whaled.alerts.rules.yml").read_text()
    assert "runbook_url: file:///usr/lib/whaled/share/docs/runbook.md#whaleddown" in rules
    assert installed.path(f"{place}/usr/lib/whaled/share/docs/runbook.md").exists()
    unit = installed.path(f"{place}/usr/lib/systemd/system/whaled.service").read_text()
    assert "/opt/whaled" not in unit
    assert re.search(r"^ExecStart=/usr/lib/whaled/venvs/[^/]+/bin/python ", unit, re.MULTILINE)

    output = make(installed, "uninstall", *target)
    assert "Still there: /etc/whaled" in output
    left = installed.run("find", place, "-not", "-type", "d").stdout.split()
    assert left == [f"{place}{CONFIG}"]
    installed.run("rm", "-rf", place)
