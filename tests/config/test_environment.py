"""Values from the environment: what Kubernetes adds to it, and files that variables name."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from whaled.config.keys import keys
from whaled.config.parse import Loaded, parse
from whaled.config.render import render
from whaled.errors import ConfigError


def loaded(environ: Mapping[str, str]) -> Loaded:
    return parse("", source="w.yaml", environ=environ, flags={})


def fault(environ: Mapping[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(environ)
    (found,) = caught.value.faults
    return str(found)


# --- service links of Kubernetes --------------------------------------------------------------------------------------


def links(name: str, address: str = "10.96.3.7", port: int = 8765, protocol: str = "tcp") -> dict[str, str]:
    """What the kubelet sets for a Service (pkg/kubelet/envvars: makeEnvVariableName, makeLinkVariables)."""
    url = f"{protocol}://[{address}]:{port}" if ":" in address else f"{protocol}://{address}:{port}"
    link = f"{name}_PORT_{port}_{protocol.upper()}"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_WS_CLIENTS": str(port),
        f"{name}_PORT": url,
        link: url,
        f"{link}_PROTO": protocol,
        f"{link}_PORT": str(port),
        f"{link}_ADDR": address,
    }


@pytest.mark.parametrize(
    ("name", "address", "protocol"),
    [
        ("WHALED", "10.96.3.7", "tcp"),
        ("WHALED", "fd00:10:96::7", "tcp"),
        ("WHALED", "10.96.3.7", "udp"),
        ("WHALED_GATEWAY", "10.96.3.7", "tcp"),  # WHALED_GATEWAY_PORT is a setting as well
        ("WHALED_HTTP", "10.96.3.7", "sctp"),
        ("WHALED_2_METRICS", "10.96.3.7", "tcp"),
    ],
)
def test_service_variables_of_kubernetes_are_skipped_with_a_warning(name: str, address: str, protocol: str) -> None:
    found = loaded(links(name, address, protocol=protocol))
    assert found.config == loaded({}).config
    (warning,) = found.warnings
    assert str(warning) == (
        f"environment: {name}_SERVICE_HOST, {name}_SERVICE_PORT, {name}_SERVICE_PORT_WS_CLIENTS, {name}_PORT "
        "and 4 more: ignored, Kubernetes sets them for a Service whose name begins with `whaled`; "
        "`enableServiceLinks: false` in the pod's spec prevents them"
    )


def test_a_setting_next_to_service_variables_is_used() -> None:
    environ = {**links("WHALED_GATEWAY"), "WHALED_GATEWAY_PORT": "9000"}
    assert loaded(environ).config.gateway.port == 9000


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("WHALED_GATEWAY_PROT", "9000", "WHALED_GATEWAY_PORT"),
        ("WHALED_GATEWY_PORT", "9000", "WHALED_GATEWAY_PORT"),
        ("WHALED_PORT", "8765", "WHALED_HTTP_PORT"),
        ("WHALED_GATEWAY_HOSTS", "127.0.0.1", "WHALED_GATEWAY_HOST"),
        ("WHALED_UPSTREAM_PROXI_FILE", "/run/secrets/proxy", "WHALED_UPSTREAM_PROXY_FILE"),
    ],
)
def test_a_misspelt_setting_is_refused_with_what_was_meant(name: str, value: str, meant: str) -> None:
    assert fault({**links("WHALED"), name: value}) == (
        f"environment variable {name}: no such setting; did you mean `{meant}`?"
    )


# --- files that variables name ----------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return tmp_path / "secret"


PROXY = "http://user:hunter2@proxy.example:3128"


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("begin", ["", "\ufeff"])
def test_a_value_is_read_from_a_file_without_the_line_end(secret: Path, begin: str, end: str) -> None:
    secret.write_bytes(f"{begin}{PROXY}{end}".encode())
    found = loaded({"WHALED_UPSTREAM_PROXY_FILE": str(secret)})
    assert found.config.upstream.proxy == PROXY
    assert found.origins["upstream.proxy"] == f"environment variable WHALED_UPSTREAM_PROXY_FILE ({secret})"
    assert "hunter2" not in render(found)


def test_every_key_can_come_from_a_file(secret: Path) -> None:
    secret.write_text("true\n")
    assert loaded({"WHALED_AUTH_ENABLED_FILE": str(secret)}).config.auth.enabled
    secret.write_text("https://a.example,app://\n")
    origins = loaded({"WHALED_GATEWAY_ORIGINS_FILE": str(secret)}).config.gateway.origins
    assert origins == ("https://a.example", "app://")
    variables = [key.variable for key in keys().values()]
    assert len({*variables, *(name + "_FILE" for name in variables)}) == 2 * len(variables)


def test_a_link_is_followed_as_kubernetes_lays_secrets_out(tmp_path: Path) -> None:
    (tmp_path / "..2026_11_28").mkdir()
    (tmp_path / "..2026_11_28" / "proxy").write_text(PROXY)
    (tmp_path / "..data").symlink_to("..2026_11_28")
    (tmp_path / "proxy").symlink_to("..data/proxy")
    assert loaded({"WHALED_UPSTREAM_PROXY_FILE": str(tmp_path / "proxy")}).config.upstream.proxy == PROXY


def test_a_value_that_is_set_twice_is_refused(secret: Path) -> None:
    secret.write_text("9000\n")
    assert fault({"WHALED_GATEWAY_PORT_FILE": str(secret), "WHALED_GATEWAY_PORT": "9000"}) == (
        "environment variable WHALED_GATEWAY_PORT_FILE: gateway.port: WHALED_GATEWAY_PORT is set too: unset one of them"
    )
    assert loaded({"WHALED_GATEWAY_PORT_FILE": str(secret), **links("WHALED_GATEWAY")}).config.gateway.port == 9000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfeh\x00t\x00", "is not UTF-8 (byte 1)"),
        (b"a\x80", "is not UTF-8 (byte 2)"),
        (b"ws://h/\n\nx", "without control characters"),
        (b"ws://h/\x00", "without control characters"),
        (b"", "is empty"),
        (b"hunter2", ": upstream.url: expected ws://host[:port]/... or wss://"),
        (b"x" * 70_000, "is larger than 64KiB: it cannot be the value of a key"),
    ],
)
def test_a_file_with_odd_bytes_is_refused_without_its_content(secret: Path, content: bytes, problem: str) -> None:
    secret.write_bytes(content)
    found = fault({"WHALED_UPSTREAM_URL_FILE": str(secret)})
    assert found.startswith("environment variable WHALED_UPSTREAM_URL_FILE")
    assert "upstream.url: " in found
    assert problem in found
    assert "hunter2" not in found


def test_a_path_that_is_not_a_regular_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (
        (tmp_path / "none", f"cannot read {tmp_path}/none: No such file or directory"),
        (tmp_path / "pipe", f"{tmp_path}/pipe is not a regular file"),
        (tmp_path, f"{tmp_path} is not a regular file"),
        (Path("/dev/null"), "/dev/null is not a regular file"),
        ("", "names no file"),
    ):
        assert fault({"WHALED_UPSTREAM_URL_FILE": str(path)}) == (
            f"environment variable WHALED_UPSTREAM_URL_FILE: upstream.url: {problem}"
        )


def test_a_list_of_sections_is_written_in_the_file_only(secret: Path) -> None:
    for name in ("WHALED_DETECTION_WATCH", "WHALED_DETECTION_WATCH_FILE"):
        assert fault({name: str(secret)}).endswith("a variable cannot hold a list of sections: write it in the file")


def test_a_file_without_a_value_or_in_the_place_of_its_path_is_named(tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_text("\n")
    for name, key in (("WHALED_GATEWAY_PORT_FILE", "gateway.port"), ("WHALED_UPSTREAM_PROXY_FILE", "upstream.proxy")):
        assert fault({name: str(path)}) == f"environment variable {name}: {key}: {path} is empty"
    for text in ('{"version": 1}', "a\nb"):
        path.write_text(text)
        found = fault({"WHALED_AUTH_KEY_RING_FILE": str(path)})
        assert found.endswith(
            f"{path} has {len(text)} characters that are not a path: it must contain the path of a file"
        )


def test_a_variable_that_is_near_to_none_gets_no_suggestion() -> None:
    for name in ("WHALED_BIN", "WHALED_BIN_FILE", "WHALED_HOME", "WHALED_SERVICE_HOST"):
        assert fault({name: "x"}) == f"environment variable {name}: no such setting"
