"""Attempt many operations inside a unit's sandbox, and write the results to its state directory.

python probe.py ELSEWHERE EGRESS: an address that the unit does not allow, and the egress proxy's socket.
"""

import contextlib
import ctypes
import errno
import hmac
import json
import mmap
import os
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
STATE = Path(os.environ["STATE_DIRECTORY"])
PASSED = 3
PATIENCE_S = 1.0
CLONE_NEWUSER = 0x10000000
READ_WRITE_EXECUTE = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
elsewhere, egress = sys.argv[1:]


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library that returns -1 on failure. Raises OSError."""
    ctypes.set_errno(0)
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


# --- operations that whaled needs ---


def event_log() -> None:
    with contextlib.closing(sqlite3.connect(STATE / "probe.db", isolation_level=None)) as log:
        assert log.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
        log.execute("PRAGMA synchronous=FULL")
        log.execute("CREATE TABLE IF NOT EXISTS event (body TEXT)")
        log.execute("BEGIN")
        log.executemany("INSERT INTO event VALUES (?)", [("x" * 1000,)] * 5000)
        log.execute("COMMIT")
        log.execute("PRAGMA temp_store=FILE")
        log.execute("PRAGMA cache_size=10")
        log.execute("SELECT count(*) FROM (SELECT body || rowid AS b FROM event ORDER BY b)").fetchone()
        log.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        log.execute("VACUUM")


def temporary_file() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"x")


def threads() -> None:
    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(int, range(100))) == 4950


def tls_roots() -> None:
    assert ssl.create_default_context().cert_store_stats()["x509_ca"] > 0


def resolver() -> None:
    assert socket.getaddrinfo("localhost", 80)


def signatures() -> None:
    import jwt  # noqa: PLC0415

    key = os.urandom(32)
    assert jwt.decode(jwt.encode({"sub": "probe"}, key, "HS256"), key, ["HS256"]) == {"sub": "probe"}
    assert hmac.digest(key, b"x", "sha256")


def whole_program() -> None:
    """Import every compiled extension that whaled uses."""
    import whaled.cli.main  # noqa: F401, PLC0415


def key_ring() -> None:
    ring = Path("/etc/whaled/keys.json")
    assert '"secret"' in ring.read_text()
    assert ring.stat().st_mode & 0o037 == 0
    assert ring.stat().st_uid == 0


def journal() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"MESSAGE=probe\nPRIORITY=6\nWHALED_PROBE=1\n", "/run/systemd/journal/socket")


def notify() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"STATUS=probing", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))


def give_memory_back() -> None:
    LIBC.malloc_trim(0)


def own_numbers() -> None:
    assert int(Path("/proc/self/statm").read_text().split()[1]) > 0
    assert len(list(Path("/proc/self/fd").iterdir())) > 3
    assert time.clock_gettime(time.CLOCK_BOOTTIME) > 0


def own_cgroup() -> None:
    """Read the limits of the cgroup if it has any; the test checks them."""
    path = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    group = Path("/sys/fs/cgroup") / path.removeprefix("0::").lstrip("/")
    assert (group / "cgroup.procs").exists()
    if (group / "memory.max").exists():
        facts["memory.max"] = (group / "memory.max").read_text().strip()
        assert int((group / "memory.current").read_text()) > 0


def backend_here() -> None:
    """Connect to a backend on this machine over TCP."""
    socket.create_connection(("127.0.0.1", 18999), PATIENCE_S).close()


def way_out() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(egress)


def client() -> None:
    """Accept a client from ELSEWHERE: IPAddressDeny= does not apply to the passed socket."""
    assert os.environ["LISTEN_FDNAMES"] == "ws"
    with socket.socket(fileno=PASSED) as listener:
        listener.settimeout(10)
        connection, address = listener.accept()
        with connection:
            assert address[0] == elsewhere, address
            connection.sendall(b"hello")


# --- operations of an attacker who has taken over the daemon ---


def execute(path: str, *arguments: str) -> None:
    """Execute a program and ignore its exit status. Raises OSError if it cannot be executed."""
    subprocess.run([path, *arguments], check=False, stdin=subprocess.DEVNULL)


def dropped_program(directory: str | Path) -> Callable[[], None]:
    def attempt() -> None:
        program = Path(directory) / "dropped"
        shutil.copyfile(os.path.realpath(sys.executable), program)
        try:
            program.chmod(0o700)
            execute(str(program), "-c", "")
        finally:
            program.unlink()

    return attempt


def dropped_library() -> None:
    library = STATE / "dropped.so"
    shutil.copyfile(sys.executable, library)
    with library.open("rb") as file:
        mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)


def memory_as_file() -> None:
    os.close(os.memfd_create("dropped"))


def write_and_execute() -> None:
    mmap.mmap(-1, 4096, prot=READ_WRITE_EXECUTE)


def write_then_execute() -> None:
    page = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    call("mprotect", ctypes.c_void_p(address), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_EXEC)


def a_socket(family: int, kind: int, protocol: int = 0) -> Callable[[], None]:
    return lambda: socket.socket(family, kind, protocol).close()


def write_to(directory: str) -> Callable[[], object]:
    return lambda: (Path(directory) / "dropped").write_text("")


def set_uid_file() -> None:
    file = STATE / "suid"
    file.write_text("")
    file.chmod(0o4755)


def connect_elsewhere() -> None:
    socket.create_connection((elsewhere, 18999), PATIENCE_S).close()


def listen_elsewhere() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 18998))


ALLOWED: tuple[Callable[[], None], ...] = (
    event_log, temporary_file, threads, tls_roots, resolver, signatures, whole_program, key_ring, journal, notify,
    give_memory_back, own_numbers, own_cgroup, backend_here, way_out, client,
)  # fmt: skip
REFUSED: dict[str, Callable[[], object]] = {
    "shell": lambda: execute("/bin/sh", "-c", ":"),
    "program": lambda: execute("/usr/bin/env"),
    "program in state": dropped_program(STATE),
    "program in /tmp": dropped_program("/tmp"),
    "program in /var/tmp": dropped_program("/var/tmp"),
    "program in /dev/shm": dropped_program("/dev/shm"),
    "program in /run": dropped_program("/run"),
    "library in state": dropped_library,
    "memory as file": memory_as_file,
    "write and execute": write_and_execute,
    "write, then execute": write_then_execute,
    "raw socket": a_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "netlink socket": a_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "packet socket": a_socket(socket.AF_PACKET, socket.SOCK_RAW),
    "crypto socket": a_socket(socket.AF_ALG, socket.SOCK_SEQPACKET),
    "namespace": lambda: call("unshare", CLONE_NEWUSER),
    "mount": lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "change of root": lambda: os.chroot("/tmp"),
    "real-time priority": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "niceness": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
    "personality": lambda: call("personality", 0x0008),
    "clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
    "host name": lambda: call("sethostname", b"taken", 5),
    "set-uid file": set_uid_file,
    "kernel log": lambda: Path("/dev/kmsg").read_bytes(),
    "write to /etc": write_to("/etc"),
    "write to /etc/whaled": write_to("/etc/whaled"),
    "write to /run": write_to("/run"),
    "write to /opt/whaled": write_to("/opt/whaled"),
    "write to the program": write_to(sys.prefix),
    "write to libraries": write_to("/usr/lib"),
    "write to cgroup": write_to("/sys/fs/cgroup"),
    "homes": lambda: list(Path("/root").iterdir()),
    "another process": lambda: Path("/proc/1").stat(),
    "the system's numbers": lambda: Path("/proc/stat").stat(),
    "write to the key ring": lambda: os.open("/etc/whaled/keys.json", os.O_WRONLY | os.O_APPEND),
    "connection elsewhere": connect_elsewhere,
    "connection here": backend_here,
    "port of its own": listen_elsewhere,
}  # fmt: skip


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as fault:
        # A TimeoutError raised by Python has no errno.
        return errno.errorcode[fault.errno] if fault.errno else type(fault).__name__
    except Exception as fault:  # noqa: BLE001 - the test has the expected result
        return f"{type(fault).__name__}: {fault}"
    return "done"


def writable_and_executable() -> list[str]:
    """Return the visible mount points that are writable and allow execution."""
    mounts: dict[str, tuple[str, set[str]]] = {}  # the last of several mounts at a mount point is the visible one
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        _, _, device, _, place, options, *rest = line.split()
        if "devpts" not in rest:  # terminals only, never files
            mounts[place] = (device, set(options.split(",")))
    found = []
    for place, (device, how) in mounts.items():
        with contextlib.suppress(OSError):
            number = Path(place).stat().st_dev  # another device's number if a mount above hides this one
            if f"{os.major(number)}:{os.minor(number)}" == device and not {"ro", "noexec"} & how:
                found.append(place)
    return found


facts: dict[str, object] = {
    "writable and executable": writable_and_executable(),
    "processes": [path.name for path in Path("/proc").iterdir() if path.name.isdigit()] == [str(os.getpid())],
    "status": dict(
        line.split(":\t", maxsplit=1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    ),
}
result = {
    "allowed": {attempt.__name__: outcome(attempt) for attempt in ALLOWED},
    "refused": {name: outcome(attempt) for name, attempt in REFUSED.items()},
    "facts": facts,
}
(STATE / "result.json").write_text(json.dumps(result))
