"""Helpers shared by the fuzz tests: a stored corpus, JSON-aware mutations, and a time-bounded search for failures.

`FUZZ_SECONDS=300 make fuzz` searches longer, `FUZZ_SEED=` starts with the seed of a round that failed. A failing input
is written to var/fuzz; copy it to tests/data/fuzz, whose inputs are tested on every run.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from kit.paths import DATA, ROOT

CORPUS = DATA / "fuzz"
FINDS = ROOT / "var" / "fuzz"
# The time for each search; 0 is one short round that is the same on every run.
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
# The seed of the first round. A failed round prints its seed.
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "0"))
EXAMPLES = 250 if SECONDS == 0 else 2_000
# The limit of the thread's CPU time for one input, which other load does not affect. No valid input of this size takes
# a tenth of it.
INPUT_LIMIT_S = 0.75
MUTATIONS_MOST = 5

Check = Callable[[bytes], None]
# Numbers that select a mutation: its kind, its place and its value.
Choice = tuple[int, int, int]


def corpus(name: str) -> list[Any]:
    """Return the stored inputs of a parser, as pytest parameters."""
    return [pytest.param(path.read_bytes(), id=path.stem) for path in sorted((CORPUS / name).iterdir())]


def seconds(check: Check, raw: bytes) -> float:
    """Return the CPU time of this thread that one input takes, in seconds."""
    before = time.thread_time()
    check(raw)
    return time.thread_time() - before


def hunt(name: str, check: Check, seeds: Sequence[bytes], words: Sequence[Any]) -> None:
    """Test mutations of `seeds` for SECONDS. `words` are inserted as values, and strings also as keys."""
    inputs = st.builds(
        lambda start, choices, text, style: mutated(seeds[start % len(seeds)], choices, text, style, words),
        st.integers(0, len(seeds) - 1),
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2**20), st.integers(0, 2**16)), max_size=MUTATIONS_MOST),
        st.lists(st.tuples(st.integers(0, 15), st.integers(0, 2**20), st.integers(0, 2**16)), max_size=2),
        st.integers(0, len(STYLES) + 3),
    )

    def tried(raw: bytes) -> None:
        try:
            took = seconds(check, raw)
            if took >= INPUT_LIMIT_S:  # a garbage collection or a cold cache may have slowed the first attempt
                took = min(took, seconds(check, raw))
            assert took < INPUT_LIMIT_S, f"{took:.1f} s of CPU for {len(raw)} bytes"
        except BaseException:
            FINDS.mkdir(parents=True, exist_ok=True)
            # Hypothesis shrinks the input, so the last one written is the smallest.
            (FINDS / f"{name}-smallest.json").write_bytes(raw)
            raise

    quiet = settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    end = time.monotonic() + SECONDS
    number = 0
    while True:
        # The first round is always the same, which makes `make test` deterministic; the others have random seeds.
        chosen = FIRST_SEED if number == 0 else random.getrandbits(64)
        try:
            seed(chosen)(quiet(given(inputs)(tried)))()
        except BaseException as error:
            error.add_note(f"round {number} of the hunt {name!r}, seed {chosen}: FUZZ_SEED={chosen} begins with it")
            raise
        number += 1
        if time.monotonic() >= end:
            return


# --- mutations -------------------------------------------------------------------------------------------------------

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -(2**63) - 1, 0.5, -0.0, 1e300, 5e-324,
    21_000_000 * 10**8, 21_000_000 * 10**8 + 1, "", " ", "0", "a" * 63, "a" * 64, "A" * 64, "\u0390" * 64, "\x00" * 64,
    '"' * 64, "\\" * 64, "\U0001f40b" * 64, "x" * 5_000, [], {}, [[]], [None], {"": None}, [0] * 300, {"txid": []},
)  # fmt: skip
TOKENS: tuple[bytes, ...] = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"-", b"0", b"1e999", b"9" * 25, b"9" * 5_000, b"NaN",
    b"\x00", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b" ", b"\n", b"[" * 600, b'{"a":' * 600,
    b"//", b".",
)  # fmt: skip
STYLES: tuple[dict[str, Any], ...] = (
    {"separators": (",", ":")},
    {"separators": (",", ":"), "ensure_ascii": False},
    {"separators": (" , ", " : ")},
    {"indent": 1},
    {"separators": (",", ":"), "sort_keys": True},
)


def mutated(start: bytes, choices: Iterable[Choice], text: Iterable[Choice], style: int, words: Sequence[Any]) -> bytes:
    """Return a seed with changes to its structure, then to its bytes."""
    holder = [json.loads(start)]
    for what, where, which in choices:
        _change(holder, what, where, which, (*NASTY, *words))
    how = STYLES[style] if style < len(STYLES) else STYLES[0]
    raw = json.dumps(holder[0], **how).encode("utf-8", "surrogatepass")
    for what, where, which in text:
        raw = _scratch(raw, what, where % (len(raw) + 1), which)
    return raw


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) in a document, breadth first."""
    found: list[tuple[Any, Any]] = []
    queue = [value]
    for container in queue:  # the loop appends to the queue
        inner = list(container.items()) if isinstance(container, dict) else list(enumerate(container))
        for key, child in inner:
            found.append((container, key))
            if isinstance(child, dict | list):
                queue.append(child)
    return found


def _change(holder: list[Any], what: int, where: int, which: int, words: Sequence[Any]) -> None:
    places = _places(holder)
    container, key = places[where % len(places)]
    word = deepcopy(words[which % len(words)])  # the next mutation may change the inserted value
    match what:
        case 0 | 1:
            container[key] = word
        case 2 if len(places) > 1 and container is not holder:
            del container[key]
        case 3:
            other, place = places[which % len(places)]
            container[key] = deepcopy(other[place])
        case 4 if isinstance(container, list):
            container[:] = container + [container[key]] * (which % 40)
        case 5 if isinstance(container, dict) and isinstance(word, str):
            container[word] = container.pop(key)
        case 6 if isinstance(container, dict):
            container[str(word)[:80]] = deepcopy(words[(which >> 4) % len(words)])
        case 7:
            container[key] = [container[key]]
        case _:
            container[key] = word


def _scratch(raw: bytes, what: int, where: int, which: int) -> bytes:
    match what:
        case 0:
            return raw[:where]
        case 1:
            return raw[where:]
        case 2 | 3:
            return raw[:where] + bytes([which % 256]) + raw[where + 1 :]
        case 4:
            return raw[:where] + raw[where + which % 64 :]
        case 5:
            return raw[:where] + raw[where : where + which % 4096] * 2 + raw[where + which % 4096 :]
        case 6 if which % 8 == 0:
            return raw + raw
        case _:
            return raw[:where] + TOKENS[which % len(TOKENS)] + raw[where:]


def scaling(make: Callable[[int], bytes], run: Check, size: int, times: int = 8) -> float:
    """Return the ratio of CPU time of an input `times` as long, best of three: about `times` if the time is linear."""

    def took(count: int) -> float:
        raw = make(count)
        best = float("inf")
        for _ in range(3):
            before = time.thread_time()
            run(raw)
            best = min(best, time.thread_time() - before)
        return best

    return took(size * times) / max(took(size), 1e-4)
