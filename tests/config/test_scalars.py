"""Numbers and booleans as people write them, where YAML reads them as something else."""

import pytest

from kit.configuration import faults, read


@pytest.mark.parametrize(
    ("text", "number"),
    [("1_000", 1000), (".5", 0.5), ("5.", 5), ("0x1F", 31), ("0b11", 3), ("1.5e+3", 1500), ("007", 7), ("+100", 100)],
)
def test_numbers_that_yaml_reads_as_people_do_are_read(text: str, number: float) -> None:
    assert read(f"detection: {{threshold_btc: {text}}}\n").detection.threshold_btc == number


MISREAD = [
    ("0100", "; YAML reads 0100 as 64 (octal): did you mean 100?"),
    ("0_100", "; YAML reads 0_100 as 64 (octal): did you mean 100?"),
    ("1:40", "; YAML reads 1:40 as 100 (base 60): write 100 if that is meant"),
    ("1:40.5", "; YAML reads 1:40.5 as 100.5 (base 60): write 100.5 if that is meant"),
    ("1e3", "; write it as 1000"),
    ("1.5e3", "; write it as 1500"),
    ("0o144", "; write it as 100"),
    ("08", "; write it as 8"),
    ("1000000", ""),
    ("1 000", "; write it as 1000"),
    ("1'000'000.5", "; write it as 1000000.5"),
    ("1e300", ""),
    ("many", ""),
]


@pytest.mark.parametrize(("text", "hint"), MISREAD)
def test_a_number_that_yaml_reads_as_another_one_is_refused_with_a_suggestion(text: str, hint: str) -> None:
    if text == "1000000":
        assert read(f"detection:\n  threshold_btc: {text}\n").detection.threshold_btc == 1e6
        return
    allowed = "expected a number from 0.00000001 to 21000000 or null"
    for found, place in (
        (faults(f"detection:\n  threshold_btc: {text}\n"), "w.yaml:2"),
        (faults("", {"WHALED_DETECTION_THRESHOLD_BTC": text}), "environment variable WHALED_DETECTION_THRESHOLD_BTC"),
        (faults("", flags={"detection.threshold_btc": text}), "option --whale-threshold"),
    ):
        assert len(found) == 1
        assert found[0].startswith(f"{place}: detection.threshold_btc: found ")
        assert found[0].endswith(allowed + hint)


def test_a_number_of_thousands_is_grouped_as_people_group_it() -> None:
    assert faults("detection:\n  threshold_btc: 1,000\n")[0].endswith("or null; write it as 1000")
    for number, rest in (("1,000", "000"), ("1,000,000", "000")):
        found = faults(f"detection: {{threshold_btc: {number}}}\n")
        problems = [each for each in found if f"detection.{rest}: no such key" in each]
        written = f"no such key; if it belongs to the number of `threshold_btc`, write it as {number.replace(',', '')}"
        assert problems
        assert all(problem.endswith(written) for problem in problems)
    assert "write it as" not in faults("detection: {000: 5}\n")[0]
    assert faults("gateway:\n  port: 08765\n")[0].endswith("; write it as 8765")


@pytest.mark.parametrize(
    ("word", "meant"), [("on", True), ("off", False), ("yes", True), ("No", False), ("TRUE", True)]
)
def test_words_that_yaml_reads_as_true_and_false_are_read(word: str, meant: bool) -> None:
    assert read(f"detection: {{fetch_inputs: {word}}}\n").detection.fetch_inputs is meant


@pytest.mark.parametrize(
    ("word", "meant"), [("'no'", "false"), ("n", "false"), ("0", "false"), ("Y", "true"), ("1", "true")]
)
def test_other_words_for_true_and_false_are_refused_with_a_suggestion(word: str, meant: str) -> None:
    assert faults(f"auth: {{enabled: {word}}}\n")[0].endswith(f"expected true or false; did you mean {meant}?")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("auth: {issuer: 0100}", "found 0100, expected a string or null; did you mean '0100', in quotes?"),
        ("eventlog: {path: 2026-01-01}", "found 2026-01-01, expected a path; did you mean '2026-01-01', in quotes?"),
        (
            "auth: {issuer: off}",
            "found off, expected a string or null; YAML reads off as false; did you mean 'off', in quotes?",
        ),
        ("eventlog: {retention: 1:30}", '"36525d"; YAML reads 1:30 as 90 (base 60)'),
        ("gateway: {max_frame: 010000}", '"1024GiB"; YAML reads 010000 as 4096 (octal)'),
        ("gateway: {port: 2026-01-01}", "found 2026-01-01, expected a whole number from 0 to 65535"),
    ],
)
def test_a_value_that_yaml_converts_is_quoted_as_it_was_written(text: str, end: str) -> None:
    assert faults(text)[0].endswith(end)
