"""Listening on one host or several: both families, one port, and what is missing on this machine."""

import asyncio
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.daemon import running, starting, write_config
from kit.gateway import receive, running_gateway
from whaled.errors import ListenError
from whaled.listening import Listening, address_of, open_sockets

# An address of TEST-NET-3 (RFC 5737): no machine has it.
NOWHERE = "203.0.113.7"


async def opened(*hosts: str, port: int = 0) -> Listening:
    return await open_sockets(hosts, port, 16, section="gateway")


def close(listening: Listening) -> list[str]:
    """The addresses that were listened on."""
    names = [address_of(sock) for sock in listening.sockets]
    for sock in listening.sockets:
        sock.close()
    return names


def hosts_of(listening: Listening) -> list[str]:
    names = close(listening)
    assert len({name.rpartition(":")[2] for name in names}) == 1, "all on one port"
    return [name.rpartition(":")[0] for name in names]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (("127.0.0.1",), ["127.0.0.1"]),
        (("::1",), ["[::1]"]),
        (("::",), ["[::]", "0.0.0.0"]),
        (("0.0.0.0",), ["0.0.0.0"]),
        (("127.0.0.1", "::1"), ["127.0.0.1", "[::1]"]),
        (("127.0.0.1", "127.0.0.1", "0:0::1", "::1"), ["127.0.0.1", "[::1]"]),
        (("127.0.0.1", "0.0.0.0", "::1"), ["0.0.0.0", "[::1]"]),
        (("127.0.0.1", "::", "::1"), ["[::]", "0.0.0.0"]),
    ],
)
async def test_each_address_is_listened_on_once_all_on_one_port(hosts: tuple[str, ...], expected: list[str]) -> None:
    found = await opened(*hosts)
    assert found.missing == ()
    assert hosts_of(found) == expected


async def test_a_name_is_every_address_that_it_has() -> None:
    found = await opened("localhost")
    assert "127.0.0.1" in hosts_of(found)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (NOWHERE, "this machine has no such address"),
        ("2001:db8::7", "this machine has no such address"),
        ("lo", "this is a network interface: write the address that it has"),
        ("whale.invalid", "the name cannot be resolved"),
        ("fe80::1%nowhere", "this machine has no interface nowhere"),
        ("::1%lo", "the address cannot be used"),
        ("fe80::1%lo", "this machine has no such address"),
    ],
)
async def test_a_missing_address_does_not_keep_the_others_from_listening(host: str, reason: str) -> None:
    found = await opened(host, "127.0.0.1")
    assert hosts_of(found) == ["127.0.0.1"]
    (missing,) = found.missing
    assert missing.host == host.partition("%")[0] if "no such address" in reason else host
    assert missing.reason.startswith(reason)


async def test_each_reason_is_named_if_no_address_exists() -> None:
    with pytest.raises(ListenError) as caught:
        await opened(NOWHERE, "lo", port=8765)
    assert str(caught.value) == (
        "cannot listen on 203.0.113.7, lo port 8765: lo: this is a network interface: write the address that it has; "
        "203.0.113.7: this machine has no such address; set gateway.host and gateway.port"
    )


async def test_an_address_that_another_program_uses_is_refused_although_the_others_are_free() -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            await opened("127.0.0.1", "::1", port=port)
        assert str(caught.value) == (
            f"cannot listen on ::1 port {port}: Address already in use; set gateway.host and gateway.port, "
            "or stop what uses the port"
        )
    close(await opened("127.0.0.1", "::1", port=port))  # nothing was left open


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each port that the kernel chooses for IPv4 is taken at the second address, so often."""
    times = [3]

    class Socket(socket.socket):
        def bind(self, address: Any) -> None:
            if address[0] == "::1" and times[0]:
                times[0] -= 1
                raise OSError(errno.EADDRINUSE, "Address already in use")
            super().bind(address)

    monkeypatch.setattr("whaled.listening.socket.socket", Socket)
    return times


async def test_a_free_port_is_free_at_every_address(taken: list[int]) -> None:
    assert hosts_of(await opened("127.0.0.1", "::1")) == ["127.0.0.1", "[::1]"]
    assert taken == [0]
    taken[0] = 1000
    with pytest.raises(ListenError, match="cannot listen on ::1 port 0: Address already in use"):
        await opened("127.0.0.1", "::1")


async def test_both_families_are_served_and_an_ipv4_client_keeps_its_address(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, host=("::",)) as rig:
        assert [address.rpartition(":")[0] for address in rig.gateway.addresses] == ["[::]", "0.0.0.0"]
        port = rig.url.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            rig.url = f"ws://{host}:{port}"
            async with rig.connect() as client:
                assert (await receive(client))["type"] == "welcome"
                (connection,) = rig.gateway.roster.all()
                assert connection.address == host.strip("[]")
        # The canary comes by IPv4: `::` can be listened on where `::1` is missing.
        assert rig.gateway.rehearsal.place == (socket.AF_INET, ("127.0.0.1", int(port)))


@pytest.mark.slow
async def test_every_address_is_in_the_log_and_a_missing_one_with_its_reason(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        "ws://127.0.0.1:9/",
        gateway={"host": ["127.0.0.1", "::1", NOWHERE]},
        http={"host": ["::1", "lo"]},
    )
    async with running(config) as daemon:
        ready = await daemon.logged("daemon_ready")
        first, second = ready["listen"].split(", ")
        port = first.removeprefix("ws://127.0.0.1:")
        assert second == f"ws://[::1]:{port}"
        assert ready["metrics"].startswith("http://[::1]:")
        event = "listen_address_missing"
        line = await daemon.logged(event, key="gateway.host")
        assert (line["level"], line["address"], line["reason"]) == (
            "warning",
            NOWHERE,
            "this machine has no such address",
        )
        assert (await daemon.logged(event, key="http.host"))["address"] == "lo"
        daemon.url = second
        async with daemon.connect() as client:
            assert (await receive(client))["type"] == "welcome"


# --- machines without IPv6 --------------------------------------------------------------------------------------------

# Becomes a command that cannot open sockets of IPv6, or none of the network at all: as where the kernel has none, or
# systemd's RestrictAddressFamilies= forbids them (seccomp(2); the filter looks at socket(2) alone).
WITHOUT = """
import ctypes, errno, os, platform, socket, struct, sys
forbidden = getattr(socket, sys.argv[1])  # besides AF_INET6
arch, call = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[platform.machine()]
LOAD, EQUAL, RETURN, ALLOW, ERRNO = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
program = b"".join(struct.pack("HBBI", *step) for step in (
    (LOAD, 0, 0, 4), (EQUAL, 0, 6, arch), (LOAD, 0, 0, 0), (EQUAL, 0, 4, call),
    (LOAD, 0, 0, 16), (EQUAL, 1, 0, socket.AF_INET6), (EQUAL, 0, 1, forbidden),
    (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT), (RETURN, 0, 0, ALLOW),
))
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.byref(Filter(len(program) // 8, program)), 0, 0)):
    if libc.prctl(*arguments):
        sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[2], sys.argv[2:])
"""
LAUNCHER = (sys.executable, "-c", WITHOUT, "AF_INET6")
WITHOUT_NETWORK = (sys.executable, "-c", WITHOUT, "AF_INET")


def can_forbid_ipv6() -> bool:
    probe = "import socket\ntry: socket.socket(socket.AF_INET6)\nexcept OSError: print('none')"
    found = subprocess.run([*LAUNCHER, sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    return found.stdout == "none\n"


@pytest.mark.slow
@pytest.mark.parametrize("host", ["::", "localhost", ["::1", "127.0.0.1"]])
async def test_without_ipv6_the_rest_is_listened_on(tmp_path: Path, host: str | list[str]) -> None:
    if not await asyncio.to_thread(can_forbid_ipv6):
        pytest.skip("no seccomp here")
    config = write_config(
        tmp_path, "ws://127.0.0.1:9/", gateway={"host": host}, http={"host": host if isinstance(host, str) else [*host]}
    )
    async with running(config, launcher=LAUNCHER) as daemon:
        daemon.url = daemon.url.replace("0.0.0.0", "127.0.0.1")
        async with daemon.connect() as client:
            assert (await receive(client))["type"] == "welcome"


@pytest.mark.slow
async def test_without_ipv6_an_address_of_ipv6_alone_ends_the_start(tmp_path: Path) -> None:
    if not await asyncio.to_thread(can_forbid_ipv6):
        pytest.skip("no seccomp here")
    config = write_config(tmp_path, "ws://127.0.0.1:9/", gateway={"host": "::1"})
    async with starting(config, launcher=LAUNCHER) as daemon:
        assert await daemon.ended() == 78
        await daemon.heard_all()
        assert daemon.raw[-1] == (
            "whaled: cannot listen on ::1 port 0: this machine has no IPv6, or this process may not use it; "
            "set gateway.host and gateway.port"
        )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [LAUNCHER, WITHOUT_NETWORK], ids=["without IPv6", "without a network"])
def test_a_check_warns_of_missing_addresses_unless_sockets_are_not_its_own_to_open(
    tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    if not can_forbid_ipv6():
        pytest.skip("no seccomp here")
    config = write_config(tmp_path, "ws://127.0.0.1:9/", gateway={"host": "::"})
    command = [*launcher, sys.executable, "-m", "whaled", "check-config", str(config)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    warning = (
        f"whaled: warning: {config}:6: gateway.host: nobody can connect to ::: "
        "this machine has no IPv6, or this process may not use it\n"
    )
    assert found.stderr == (warning if launcher is LAUNCHER else "")
