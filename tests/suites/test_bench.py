"""The benchmark's own arithmetic, and that its three languages agree on what a message looks like."""

import time
from pathlib import Path

import pytest

from bench import daemon, messages
from bench.fanout import check_deliveries
from bench.programs import BrokenError
from bench.report import Aim, percentile, table

BENCH = Path(daemon.__file__).parent


@pytest.mark.parametrize("program", ["load.c", "limit.c"])
def test_the_c_programs_look_for_the_mark_that_messages_carry(program: str) -> None:
    assert f'#define MARK "{messages.MARK}"\n' in (BENCH / program).read_text()


def test_a_stamp_is_a_txid_with_number_and_time() -> None:
    before = time.monotonic_ns()
    stamp = messages.stamp(258)
    assert len(bytes.fromhex(stamp)) == 32
    assert stamp.startswith(messages.MARK + "0000000000000102")
    assert before <= int(stamp[32:48], 16) <= time.monotonic_ns()


def test_every_measured_frame_has_the_same_size_and_its_payload_begins_after_four_bytes() -> None:
    epoch = "e" * 16
    padding = messages.padding(epoch)
    frames = [messages.frame(number, epoch, padding) for number in (0, 1, 4_711)]
    assert {len(frame) for frame in frames} == {messages.FRAME_BYTES}
    assert all(frame[4:5] == b"{" and frame[-1:] == b"}" for frame in frames)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0), percentile(values, 0.99), percentile(values, 1)) == (1, 99, 100)
    assert percentile([7.0], 0.99) == 7


def test_an_aim_is_met_at_its_bound() -> None:
    assert Aim("", 1.2, 1.2).is_met
    assert not Aim("", 1.21, 1.2).is_met
    assert Aim("", 5.0, 5, more_is_better=True).is_met
    assert not Aim("", 4.9, 5, more_is_better=True).is_met


def test_a_table_is_markdown_with_columns_in_line() -> None:
    assert table(("a", "us"), [("limit", "9.0"), ("x", "10.25")]) == (
        "| a     |    us |\n| ----- | ----: |\n| limit |   9.0 |\n| x     | 10.25 |"
    )


def test_the_bucket_of_a_percentile_is_read_from_a_histogram() -> None:
    assert daemon.sample_key('whaled_x_seconds_bucket{le="0.005"} 98.0') == "whaled_x_seconds_bucket 0.005"
    assert daemon.sample_key("whaled_x_seconds_count 100.0") == "whaled_x_seconds_count"
    assert daemon.sample_key('whaled_errors_total{component="gateway"} 0.0') == ""
    buckets = {"whaled_x_seconds_bucket 0.005": 98.0, "whaled_x_seconds_bucket 0.01": 100.0}
    assert daemon.bucket("whaled_x_seconds", buckets, 50.0) == "<= 5"
    assert daemon.bucket("whaled_x_seconds", buckets, 99.0) == "<= 10"


@pytest.mark.parametrize("wrong", [{"delivered": 9}, {"duplicates": 1}, {"gaps": 1}, {"strays": 1}, {"lost": 1}])
def test_a_lost_or_doubled_message_breaks_the_measurement(wrong: dict[str, int]) -> None:
    right = {"delivered": 10, "wanted": 10, "duplicates": 0, "gaps": 0, "strays": 0, "lost": 0}
    check_deliveries("server", right, 10)
    with pytest.raises(BrokenError):
        check_deliveries("server", right | wrong, 10)
