import base64
import fcntl
import json
import os
import resource
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.whales import NOW
from whaled.auth.keys import generate, is_weak, read, retire, ring_of
from whaled.auth.sources import load_ring
from whaled.auth.tokens import verify
from whaled.config.sections import AuthSettings
from whaled.errors import KeyRingError

STRONG = "abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture
def ring_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    generate(path, NOW)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(KeyRingError) as caught:
        ring_of(read(path), path)
    return str(caught.value)


def test_a_new_ring_is_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        generate(tmp_path / "keys.json", NOW)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_the_newest_key_signs_and_the_others_verify(ring_file: Path) -> None:
    first = read(ring_file).keys[0].kid
    second = generate(ring_file, NOW + 1).kid
    ring = ring_of(read(ring_file), ring_file)
    assert ring.signing.kid == second
    assert [key.kid for key in ring.verifying] == [first, second]


def test_a_retired_key_is_out_of_the_ring(ring_file: Path) -> None:
    first = read(ring_file).keys[0].kid
    generate(ring_file, NOW + 1)
    retire(ring_file, first, NOW + 2)
    ring = ring_of(read(ring_file), ring_file)
    assert ring.find(first) is None
    with pytest.raises(KeyRingError, match="retired already"):
        retire(ring_file, first, NOW + 3)


def test_the_last_key_is_retired_only_by_force(ring_file: Path) -> None:
    kid = read(ring_file).keys[0].kid
    with pytest.raises(KeyRingError, match="--force"):
        retire(ring_file, kid, NOW)
    retire(ring_file, kid, NOW, force=True)
    assert "whaled keys generate" in refusal(ring_file)


def test_an_unknown_key_is_named_with_the_existing_ones(ring_file: Path) -> None:
    with pytest.raises(KeyRingError, match=read(ring_file).keys[0].kid):
        retire(ring_file, "k0", NOW)


def test_commands_at_the_same_time_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=generate, args=(path, NOW)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(path).keys) == 8


def give_to_others(path: Path, mode: int) -> None:
    """A mode; and not root's, who may give a file to a group."""
    if os.geteuid() == 0:
        os.chown(path, 4321, -1)
    path.chmod(mode)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_ring_that_others_can_read_is_refused(ring_file: Path, mode: int) -> None:
    give_to_others(ring_file, mode)
    assert f"chmod 600 {ring_file}" in refusal(ring_file)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("", "not a key ring"),
        ("{", "not a key ring"),
        ("[]", "not a key ring"),
        ('{"version": 2, "keys": []}', "version 2"),
        ('{"version": 2, "keyring": {}}', "version 2"),
        ('{"version": 1, "keys": [{"kid": "a", "secret": "%s", "created_at": 1}]}' % ("A" * 45), "base64url"),
        ('{"version": 1, "keys": [{"kid": "", "secret": "%s", "created_at": 1}]}' % ("A" * 43), "not a key ring"),
        ('{"version": 1, "keys": [{"kid": "a\\nb", "secret": "%s", "created_at": 1}]}' % ("A" * 43), "not a key ring"),
        ("[" * 100_000, "not a key ring"),
        ('{"version": 1, "keys": []}', "whaled keys generate"),
        ('{"version": 1, "keys": [{"kid": "a", "secret": "c2hvcnQ", "created_at": 1}]}', "at least 32"),
        ('{"version": 1, "keys": [{"kid": "a", "secret": "!!", "created_at": 1}]}', "base64url"),
        ('{"version": 1, "keys": [{"kid": "a", "secret": "", "created_at": 1}]}', "base64url"),
        ('{"version": 1, "keys": [{"kid": "a", "alg": "none", "secret": "c2hvcnQ", "created_at": 1}]}', "algorithm"),
        ('{"version": 1, "keys": [], "more": 1}', "not a key ring"),
    ],
)
def test_an_invalid_ring_is_named(tmp_path: Path, body: str, problem: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(body)
    path.chmod(0o600)
    assert problem in refusal(path)


def test_two_keys_of_one_name_are_refused(ring_file: Path) -> None:
    raw = json.loads(ring_file.read_text())
    raw["keys"] *= 2
    ring_file.write_text(json.dumps(raw))
    assert "same id" in refusal(ring_file)


def test_a_directory_or_a_pipe_is_refused_as_a_ring(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "regular file" in refusal(tmp_path / "pipe")
    assert "regular file" in refusal(tmp_path)


def settings(path: Path) -> AuthSettings:
    return AuthSettings(key_ring=str(path))


def test_without_any_key_the_command_to_make_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyRingError, match="whaled keys generate --key-ring"):
        load_ring(settings(tmp_path / "none.json"), {}, tmp_path)


@pytest.mark.parametrize("secret", ["", "x" * 31])
def test_an_empty_or_short_secret_is_refused_even_if_a_ring_exists(ring_file: Path, secret: str) -> None:
    with pytest.raises(KeyRingError, match="at least 32"):
        load_ring(settings(ring_file), {"WEBSOCKET_SECRET_KEY": secret}, ring_file.parent)


def test_a_secret_of_the_environment_is_a_ring_of_one(ring_file: Path) -> None:
    ring = load_ring(settings(ring_file), {"WEBSOCKET_SECRET_KEY": STRONG}, ring_file.parent)
    assert (ring.signing.kid, ring.signing.secret) == (None, STRONG.encode())
    assert ring.source == "WEBSOCKET_SECRET_KEY of the environment"


def dotenv(directory: Path, body: str = f"WEBSOCKET_SECRET_KEY={STRONG}\n", mode: int = 0o600) -> Path:
    path = directory / ".env"
    path.write_text(body)
    path.chmod(mode)
    return path


def test_a_secret_in_dotenv_counts_and_nothing_else_in_it_does(tmp_path: Path) -> None:
    path = dotenv(tmp_path, f"OTHER=$HOME\nWEBSOCKET_SECRET_KEY='{STRONG}'\n")
    ring = load_ring(settings(tmp_path / "none.json"), {}, tmp_path)
    assert ring.signing.secret == STRONG.encode()
    assert ring.source == f"WEBSOCKET_SECRET_KEY of {path}"
    assert "OTHER" not in os.environ


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666])
def test_a_dotenv_with_the_secret_is_for_its_owner_only(tmp_path: Path, mode: int) -> None:
    path = dotenv(tmp_path)
    give_to_others(path, mode)
    with pytest.raises(KeyRingError, match=f"others can read WEBSOCKET_SECRET_KEY in .*chmod 600 {path}"):
        load_ring(settings(tmp_path / "none.json"), {}, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_dotenv_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(dotenv(tmp_path), 4321, -1)
    with pytest.raises(KeyRingError, match="belongs to user 4321"):
        load_ring(settings(tmp_path / "none.json"), {}, tmp_path)


def test_a_dotenv_of_another_program_may_have_any_mode_and_the_environment_comes_first(
    tmp_path: Path, ring_file: Path
) -> None:
    dotenv(tmp_path, "OTHER=1\n", mode=0o666)
    assert load_ring(settings(ring_file), {}, tmp_path).signing.kid is not None
    dotenv(tmp_path, mode=0o666)
    assert load_ring(settings(ring_file), {"WEBSOCKET_SECRET_KEY": STRONG}, tmp_path).signing.kid is None


@pytest.mark.parametrize("sort", ["directory", "pipe", "nothing"])
def test_a_directory_or_a_pipe_called_dotenv_is_ignored(tmp_path: Path, ring_file: Path, sort: str) -> None:
    (tmp_path / "cwd").mkdir()
    if sort == "directory":  # people call their virtual environments like this
        (tmp_path / "cwd" / ".env").mkdir()
    elif sort == "pipe":
        os.mkfifo(tmp_path / "cwd" / ".env")
    assert load_ring(settings(ring_file), {}, tmp_path / "cwd").source == str(ring_file)


def test_an_enormous_dotenv_is_refused(tmp_path: Path) -> None:
    dotenv(tmp_path, "A=b\n" * 300_000)
    with pytest.raises(KeyRingError, match="larger than"):
        load_ring(settings(tmp_path / "none.json"), {}, tmp_path)


WEAK = ["x" * 32, "correct horse " * 5, "0123456789" * 5, "deadbeef" * 8, "00" * 40, "secret" * 10]


@pytest.mark.parametrize("secret", WEAK)
def test_a_weak_secret_is_refused_from_every_source(tmp_path: Path, secret: str) -> None:
    none = settings(tmp_path / "none.json")
    with pytest.raises(KeyRingError, match="too weak"):
        load_ring(none, {"WEBSOCKET_SECRET_KEY": secret}, tmp_path)
    dotenv(tmp_path, f"WEBSOCKET_SECRET_KEY='{secret}'\n")
    with pytest.raises(KeyRingError, match="too weak") as caught:
        load_ring(none, {}, tmp_path)
    assert secret not in str(caught.value)
    (tmp_path / "keys.json").write_text(
        json.dumps({"version": 1, "keys": [{"kid": "a", "secret": encoded(secret), "created_at": 1}]})
    )
    (tmp_path / "keys.json").chmod(0o600)
    assert "too weak" in refusal(tmp_path / "keys.json")


def encoded(secret: str) -> str:
    return base64.urlsafe_b64encode(secret.encode()).rstrip(b"=").decode()


@given(st.binary(min_size=32, max_size=32))
def test_random_bytes_in_hexadecimal_count_as_the_bytes_they_are(raw: bytes) -> None:
    assert is_weak(raw.hex().encode()) == (len(set(raw)) < 16 and len(set(raw.hex())) < 16)


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o772])
def test_a_ring_in_a_world_writable_directory_is_refused(ring_file: Path, mode: int) -> None:
    ring_file.parent.chmod(mode)
    try:
        assert f"chmod o-w {ring_file.parent}" in refusal(ring_file)
        with pytest.raises(KeyRingError, match="anybody can replace"):
            generate(ring_file.parent / "new.json", NOW)
        assert not (ring_file.parent / "new.json").exists()
        dotenv(ring_file.parent)
        with pytest.raises(KeyRingError, match="anybody can replace WEBSOCKET_SECRET_KEY"):
            load_ring(settings(ring_file), {}, ring_file.parent)
        ring_file.parent.chmod(0o1777)  # like /tmp: nobody may replace what is another's
        ring_of(read(ring_file), ring_file)
    finally:
        ring_file.parent.chmod(0o700)


@pytest.mark.parametrize("where", ["above", "of a link", "behind a link"])
def test_every_directory_above_a_ring_is_checked(tmp_path: Path, where: str) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    path = tmp_path / "open" / "etc" / "keys.json" if where == "above" else tmp_path / "closed" / "keys.json"
    if where == "behind a link":
        path = tmp_path / "open" / "keys.json"
    path.parent.mkdir(exist_ok=True)
    generate(path, NOW)
    if where != "above":
        link = tmp_path / ("open" if where == "of a link" else "closed") / "link.json"
        link.symlink_to(path)
        path = link
    (tmp_path / "open").chmod(0o777)
    try:
        assert "anybody can replace" in refusal(path)
    finally:
        (tmp_path / "open").chmod(0o700)


@pytest.mark.parametrize("body", [b"\xff\xfe", b"WEBSOCKET_SECRET_KEY='\xff'"])
def test_a_dotenv_that_is_not_text_is_named(tmp_path: Path, body: bytes) -> None:
    (tmp_path / ".env").write_bytes(body)
    with pytest.raises(KeyRingError, match=r"\.env"):
        load_ring(settings(tmp_path / "none.json"), {}, tmp_path)


def test_a_secret_of_any_bytes_counts_its_bytes(tmp_path: Path) -> None:
    secret = bytes(range(0xE0, 0x100))
    environ = {"WEBSOCKET_SECRET_KEY": os.fsdecode(secret)}
    assert load_ring(settings(tmp_path / "none.json"), environ, tmp_path).signing.secret == secret


def test_a_link_to_a_ring_stays_a_link(tmp_path: Path, ring_file: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(ring_file)
    generate(link, NOW + 1)
    assert link.is_symlink()
    assert len(read(ring_file).keys) == 2


def test_the_directory_of_a_new_ring_is_created_but_not_its_parents(tmp_path: Path) -> None:
    generate(tmp_path / "etc" / "keys.json", NOW)
    assert not (tmp_path / "etc").stat().st_mode & 0o022
    with pytest.raises(KeyRingError, match="mkdir -p"):
        generate(tmp_path / "mistyped" / "etc" / "keys.json", NOW)


def test_a_command_does_not_wait_for_ever_for_another(ring_file: Path) -> None:
    directory = os.open(ring_file.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        with pytest.raises(KeyRingError, match="another command"):
            generate(ring_file, NOW, patience_s=0.05)
    finally:
        os.close(directory)
    generate(ring_file, NOW)


def test_a_failed_write_leaves_the_old_ring_and_no_other_file(ring_file: Path) -> None:
    before = ring_file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(KeyRingError, match="cannot write"):
            generate(ring_file, NOW + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert ring_file.read_bytes() == before
    assert [path.name for path in ring_file.parent.iterdir()] == ["keys.json"]


def seen_by(path: Path, *, user: int, groups: list[int], directory: Path = Path("/nowhere")) -> str:
    """What a process of another user makes of a ring. It runs no new program: the user may not reach Python."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setgid(user)
            os.setuid(user)
            answer = load_ring(settings(path), {}, directory).source
        except BaseException as error:  # noqa: BLE001 - this process must not go on as a second pytest
            answer = str(error)
        os.write(into, answer.encode())
        os._exit(0)
    os.close(into)
    os.waitpid(child, 0)
    with os.fdopen(out) as answers:
        return answers.read()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A ring as Kubernetes lays out a secret with fsGroup: 4000, where every user can look for it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        root = Path(directory)
        root.chmod(0o755)
        volume = root / "secret"
        (volume / "..2026_11_28_11_00_00.1").mkdir(parents=True)
        volume.chmod(0o3777)
        generate(tmp_path / "keys.json", NOW)
        ring = volume / "..2026_11_28_11_00_00.1" / "keys.json"
        ring.write_bytes((tmp_path / "keys.json").read_bytes())
        os.chown(ring, 0, 4000)
        ring.chmod(0o440)
        (volume / "..data").symlink_to("..2026_11_28_11_00_00.1")
        (volume / "keys.json").symlink_to("..data/keys.json")
        yield volume / "keys.json"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o440, 0o640])
def test_a_ring_that_root_gave_to_a_group_is_for_processes_in_that_group(mounted: Path, mode: int) -> None:
    mounted.resolve().chmod(mode)
    assert seen_by(mounted, user=1234, groups=[4000]) == str(mounted)
    assert seen_by(mounted, user=4000, groups=[]) == str(mounted)
    assert "Permission denied" in seen_by(mounted, user=1234, groups=[])
    assert seen_by(mounted, user=0, groups=[]) == str(mounted)  # the commands of the operator


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_dotenv_in_an_inaccessible_directory_is_ignored(tmp_path: Path, mounted: Path) -> None:
    closed = mounted.parent.parent / "root"
    closed.mkdir()
    closed.chmod(0o700)
    dotenv(closed)
    assert seen_by(mounted, user=1234, groups=[4000], directory=closed) == str(mounted)
    closed.chmod(0o755)
    assert (
        seen_by(mounted, user=1234, groups=[4000], directory=closed) == f"cannot read {closed}/.env: Permission denied"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o444, 0o644, 0o660, 0o670, 0o450])
def test_a_ring_for_more_than_reading_by_its_group_is_refused(mounted: Path, mode: int) -> None:
    mounted.resolve().chmod(mode)
    answer = seen_by(mounted, user=1234, groups=[4000])
    assert answer.startswith(f"others can read the key ring {mounted} (mode {mode:04o}); run: chmod 600 {mounted}")
    assert answer.endswith(", or to let group 4000 read it: chmod 640") == (not mode & 0o007)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_users_own_ring_is_for_that_user_alone_and_root_does_not_pass_on_that_of_others(mounted: Path) -> None:
    ring = mounted.resolve()
    os.chown(ring, 1234, 4000)
    ring.chmod(0o640)
    assert "others can read" in seen_by(mounted, user=1234, groups=[4000])
    os.chown(ring, 4321, 4000)
    assert "others can read" in seen_by(mounted, user=1234, groups=[4000])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_new_key_leaves_the_ring_to_its_group(mounted: Path) -> None:
    for mode in (0o440, 0o640):
        mounted.resolve().chmod(mode)
        generate(mounted, NOW + 1)
        info = mounted.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_gid) == (mode, 4000)
    mounted.resolve().chmod(0o600)
    generate(mounted, NOW + 2)
    assert stat.S_IMODE(mounted.stat().st_mode) == 0o600


# --- a secret in a file of its own ------------------------------------------------------------------------------------


def secret_file(directory: Path, body: bytes = STRONG.encode(), mode: int = 0o600) -> dict[str, str]:
    path = directory / "secret"
    path.write_bytes(body)
    path.chmod(mode)
    return {"WEBSOCKET_SECRET_KEY_FILE": str(path)}


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_secret_comes_from_a_file_that_a_variable_names(tmp_path: Path, ring_file: Path, end: bytes) -> None:
    ring = load_ring(settings(ring_file), secret_file(tmp_path, STRONG.encode() + end), tmp_path)
    assert (ring.signing.kid, ring.signing.secret) == (None, STRONG.encode())
    assert ring.source == f"WEBSOCKET_SECRET_KEY of the file {tmp_path}/secret"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "is empty, at least 32 are needed"),
        (b"short", "has 5 bytes, at least 32 are needed"),
        (b"x" * 32, "too weak"),
        (b"topsecret" * 8 + b"\nmore", r"secret \(WEBSOCKET_SECRET_KEY_FILE\) holds several lines or a zero byte"),
        (b"topsecret" * 8 + b"\0", "holds several lines or a zero byte: expected the secret alone"),
        (b"x" * 2_000_000, "larger than"),
    ],
)
def test_a_file_that_holds_no_secret_is_refused_and_not_quoted(
    tmp_path: Path, ring_file: Path, body: bytes, problem: str
) -> None:
    with pytest.raises(KeyRingError, match=problem) as caught:
        load_ring(settings(ring_file), secret_file(tmp_path, body), tmp_path)
    assert "topsecret" not in str(caught.value)


def test_a_file_for_a_secret_is_there_private_and_the_only_one(tmp_path: Path, ring_file: Path) -> None:
    environ = secret_file(tmp_path, mode=0o644)
    for changed, problem in (
        ({}, f"others can read {tmp_path}/secret .WEBSOCKET_SECRET_KEY_FILE. .mode 0644.; run: chmod 600"),
        (
            {"WEBSOCKET_SECRET_KEY": STRONG},
            "WEBSOCKET_SECRET_KEY and WEBSOCKET_SECRET_KEY_FILE are both set: unset one",
        ),
        ({"WEBSOCKET_SECRET_KEY_FILE": str(tmp_path / "no")}, "cannot read .*no .WEBSOCKET_SECRET_KEY_FILE.: No such"),
        ({"WEBSOCKET_SECRET_KEY_FILE": str(tmp_path)}, "is not a regular file"),
        ({"WEBSOCKET_SECRET_KEY_FILE": ""}, "WEBSOCKET_SECRET_KEY_FILE names no file"),
    ):
        with pytest.raises(KeyRingError, match=problem):
            load_ring(settings(ring_file), {**environ, **changed}, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_ring_of_another_user_is_refused(ring_file: Path) -> None:
    os.chown(ring_file, 4321, -1)
    assert "belongs to user 4321" in refusal(ring_file)


def test_a_systemd_credential_comes_first_and_may_be_readable_by_its_group(tmp_path: Path, ring_file: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    kid = generate(credentials / "keys.json", NOW).kid
    (credentials / "keys.json").chmod(0o440)
    environ = {"CREDENTIALS_DIRECTORY": str(credentials), "WEBSOCKET_SECRET_KEY": "x" * 32}
    assert load_ring(settings(ring_file), environ, tmp_path).signing.kid == kid
    (credentials / "keys.json").chmod(0o444)
    with pytest.raises(KeyRingError, match="others can read"):
        load_ring(settings(ring_file), environ, tmp_path)


def test_an_error_about_a_ring_does_not_quote_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"version": 1, "keys": [{"kid": "a", "secret": 5, "created_at": "topsecret"}]}')
    path.chmod(0o600)
    assert "topsecret" not in refusal(path)


def test_a_reread_ring_verifies_tokens_signed_before(ring_file: Path) -> None:
    from kit.tokens import issued  # noqa: PLC0415 - the other file's maker of tokens

    ring = ring_of(read(ring_file), ring_file)
    assert verify(ring_of(read(ring_file), ring_file), issued(ring), NOW, AuthSettings()).key_id == ring.signing.kid
