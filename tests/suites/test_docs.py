"""The pages say nothing that the project does not hold: links, commands, examples, names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kit.docs import section
from kit.paths import ROOT
from whaled.config.keys import keys
from whaled.config.parse import parse
from whaled.config.sections import DetectionSettings, GatewaySettings, HttpSettings
from whaled.errors import Close, ConfigError, LogFailure, TokenRefusal
from whaled.eventlog.files import ADVICE
from whaled.gateway.admission import TURNED_AWAY
from whaled.gateway.handshake import REFUSAL_STATUS
from whaled.gateway.limits import Refusal
from whaled.gateway.listener import Reserve
from whaled.gateway.messages import AuthMessage
from whaled.metrics import Metrics
from whaled.model import PROJECTED_BLOCKS, SAT_PER_BTC, Flow, Input, Output, OwnerType, Shape, Transaction
from whaled.ops import descriptors
from whaled.whales import amounts, coinjoins, fees, filters
from whaled.whales.labels import MIN_FLOW_SHARE, WHOLE_SHARE, AddressBook

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CONFIGURATION, DETECTION, EVENTLOG = (
    ROOT / "docs" / f"{name}.md" for name in ("configuration", "detection", "eventlog")
)
SECTIONS = {path.partition(".")[0] for path in keys()}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


def anchors(page: Path) -> set[str]:
    """What links into a page can name, as GitHub makes it from the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_pages_name_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^):#]*)#([^)]+)\)", page.read_text())
    assert [(path, name) for path, name in links if name not in anchors(page.parent / path if path else page)] == []


ISSUING = [
    (page.name, line.partition("    #")[0])
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if "token issue" in line
]
# What an operator's shell has: the usual umask, and sudo.
SHELL = 'set -e; umask 022; sudo() { "$@"; }; whaled() { "$PYTHON" -m whaled "$@"; }\n'


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), ISSUING)
def test_commands_that_issue_a_token_leave_it_to_its_owner(tmp_path: Path, page: str, command: str) -> None:
    (tmp_path / "whaled.yaml").write_text("{}\n")
    secret = "".join(map(chr, range(48, 96)))
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "WEBSOCKET_SECRET_KEY": secret}
    for _ in range(2 if "--force" in command else 1):  # a rotation: over the token of before
        subprocess.run(["/bin/sh", "-c", SHELL + command], cwd=tmp_path, env=env, check=True, capture_output=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*.token")}
    assert modes == {"desk-1.token": 0o600}, f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_that_are_mentioned_are_documented(page: Path) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"\b(whaled_[a-z_]+[a-z])\b", page.read_text()))
    histograms = {name.removesuffix("_bucket") for name in mentioned}
    assert {name for name in histograms if name not in documented} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_label_values_of_metrics_that_are_mentioned_exist(page: Path) -> None:
    exported = Metrics().render().decode()
    mentioned = re.findall(r'\b(whaled_\w+\{\w+="\w+"\})', page.read_text())
    assert [series for series in mentioned if series not in exported] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_of_the_configuration_that_are_mentioned_exist(page: Path) -> None:
    mentioned = re.findall(r"`([a-z]+\.[a-z_]+(?:\.[a-z_]+)?)(?:`|: )", page.read_text())
    known = {*keys(), "gateway.tls"}
    assert {path for path in mentioned if path.partition(".")[0] in SECTIONS and path not in known} == set()


def test_the_faults_of_the_wrong_example_are_the_ones_shown() -> None:
    (text,) = blocks(CONFIGURATION, "yaml wrong")
    with pytest.raises(ConfigError) as caught:
        parse(text, source="whaled.yaml", environ={}, flags={})
    shown = "".join(f"whaled: {line}\n" for line in str(caught.value).splitlines())
    assert shown in blocks(CONFIGURATION, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_examples_are_accepted(page: Path) -> None:
    for text in blocks(page, "yaml"):
        if isinstance(yaml.safe_load(text), dict):
            parse(text, source=page.name, environ={}, flags={})


def test_the_example_address_book_is_accepted() -> None:
    (text,) = blocks(ROOT / "docs" / "detection.md", "csv")
    assert len(AddressBook.parse(text, "detection.md").owners) == 2


def test_the_faults_of_the_address_book_are_the_ones_shown() -> None:
    (shown,) = [block for block in blocks(DETECTION, "") if "book.csv" in block]
    address = re.findall(r"bcrt1\w+", shown)[0]
    text = f"x,{address[:-1]}g,exchang\nx,{address},fund\n"
    with pytest.raises(ConfigError) as caught:
        AddressBook.parse(text, "book.csv")
    assert [f"whaled: {line}" for line in str(caught.value).splitlines()] == shown.splitlines()


def first_cells(page: Path) -> list[str]:
    """What stands first in the rows of the tables."""
    return re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)


def test_every_shape_flow_and_owner_type_is_explained() -> None:
    assert set(first_cells(DETECTION)) >= {*Shape, *Flow}
    (types,) = re.findall(r"^\| `type` \| (.*) \|$", DETECTION.read_text(), re.MULTILINE)
    assert re.findall(r"`(\w+)`", types) == list(OwnerType)


def test_the_example_amounts_are_what_is_computed() -> None:
    text = DETECTION.read_text()
    numbers = re.search(r"`value_sat` is ([\d,]+),\s+`moved_sat` is ([\d,]+)\.", text)
    assert numbers is not None
    payer = Output(200 * 100_000_000, "0014" + "aa" * 20, None)
    transaction = Transaction(
        txid="1" * 64,
        inputs=(Input("2" * 64, 0, 0xFFFFFFFD, payer),),
        outputs=(
            Output(110 * 100_000_000, "0014" + "bb" * 20, None),
            Output(amounts.btc_to_sat("89.999983"), payer.script, None),
        ),
        fee_sat=1700,
        vsize=141.0,
    )
    told = [int(number.replace(",", "")) for number in numbers.groups()]
    assert told == [transaction.value_sat, amounts.moved_sat(transaction)]


def test_the_numbers_of_shape_and_urgency_are_those_of_the_code() -> None:
    text = DETECTION.read_text()
    assert f"Values of {coinjoins.ABOVE_SAT} sat or" in text
    assert f"| {coinjoins.EQUAL} or more outputs have the same value" in text
    assert f"With unknown inputs {coinjoins.EQUAL_BLIND} such outputs or more" in text
    assert f"hold {coinjoins.LEAST_VALUE_SHARE:.0%}".replace("%", " %") in text
    assert f"for each {'four'} coins" in text
    assert coinjoins.COINS_OF_ONE == 4
    assert f"at most {coinjoins.PAIR_INPUTS} inputs" in text
    assert f"at least {coinjoins.STANDARD_OUTPUTS} outputs and {coinjoins.STANDARD_INPUTS} input scripts" in text
    assert f"{coinjoins.STANDARD_LEAST_SAT:,} sat to {coinjoins.STANDARD_MOST_SAT // SAT_PER_BTC:,} BTC" in text
    assert f"which is there {coinjoins.LEVEL_LEAST} times or more" in text
    assert f"| {coinjoins.ROUND_SCRIPTS} input scripts or more" in text
    assert f"`detection.min_flow_share` ({MIN_FLOW_SHARE:g})" in text
    assert f"({MIN_FLOW_SHARE * WHOLE_SHARE:.0%}".replace("%", " %)") in text
    assert DetectionSettings().min_flow_share == MIN_FLOW_SHARE
    scores = dict(re.findall(r"^\| `(\w+)Fee` \| ([\d.]+) \|$", text, re.MULTILINE))
    assert {name: float(score) for name, score in scores.items()} == {
        "minimum": fees.AT_MINIMUM,
        "economy": fees.AT_ECONOMY,
        "hour": fees.AT_HOUR,
        "halfHour": fees.AT_HALF_HOUR,
        "fastest": fees.AT_FASTEST,
    }
    assert f"less than {fees.FULL_VSIZE:,} vB" in text
    assert f"({PROJECTED_BLOCKS} at most" in text


def test_every_reason_for_a_failure_of_the_log_is_explained() -> None:
    assert {cell for cell in first_cells(EVENTLOG) if cell != "reason"} == set(LogFailure)


@pytest.mark.parametrize("reason", [LogFailure.LOCKED, LogFailure.DISK_FULL, LogFailure.CORRUPT])
def test_the_failures_of_the_log_are_documented_as_shown(reason: LogFailure) -> None:
    assert ADVICE[reason] in EVENTLOG.read_text()


def test_every_reason_and_outcome_that_is_counted_is_explained() -> None:
    page = ROOT / "docs" / "metrics.md"
    refusals = re.findall(r"^\| `(\w+)` \|", section(page, "### Why connections are refused"), re.MULTILINE)
    assert sorted(refusals) == sorted(Refusal)
    outcomes = re.findall(r"^\| `(\w+)` \|", section(page, "### How authentications end"), re.MULTILINE)
    assert sorted(outcomes) == sorted(["success", *TokenRefusal, *(message.name.lower() for message in AuthMessage)])


def test_every_close_and_every_http_answer_is_explained() -> None:
    page = ROOT / "docs" / "protocol.md"
    closes = section(page, "## Close codes")
    by_the_library = {1000, 1002}
    for code in {close.code for close in Close} | by_the_library:
        assert re.search(rf"^\| [^|]*\b{code}\b", closes, re.MULTILINE), code
    for close in Close:
        if close.code in (1008, 1013):
            assert f"`{close.reason}`" in closes
    for message in AuthMessage:
        assert f"`{message}`" in " ".join(section(page, "## Authentication").split())
    answers = section(page, "## HTTP answers")
    explained = set(re.findall(r"^\| (\d+)", answers, re.MULTILINE))
    assert {str(status) for status, _ in REFUSAL_STATUS.values()} <= explained


def test_the_sum_of_descriptors_is_that_of_the_code() -> None:
    text = section(CONFIGURATION, "## Descriptors")
    fixed = TURNED_AWAY + Reserve.SIZE + descriptors.OWN
    assert f"gateway.max_connections + http.max_connections + {fixed} " in text
    assert f"{TURNED_AWAY} for connections that wait" in text
    assert f"{GatewaySettings().max_connections + HttpSettings().max_connections + fixed:,} by default" in text
    assert f"http.max_connections + {fixed + 1} ({HttpSettings().max_connections + fixed + 1} by default)" in text
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    assert f"larger by {HttpSettings().max_connections + fixed}]" in runbook


def test_the_protocol_page_lists_every_filter() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    listed = re.search(r"^A filter is an object of optional conditions.*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`([a-z_]+)`", listed[0])) == set(filters.KEYS)
