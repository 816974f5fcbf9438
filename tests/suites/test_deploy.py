"""What is shipped beside the program can be read, and is installed so that its links lead somewhere."""

import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from kit.paths import ROOT

DEPLOY = ROOT / "deploy"


def test_shipped_yaml_is_yaml() -> None:
    for path in DEPLOY.rglob("*.y*ml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def make_share(directory: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    """`make install-share` into a directory."""
    command = ["make", "--no-print-directory", "-C", str(ROOT), "install-share", f"DESTDIR={directory}", *variables]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def runbook_urls(share: Path) -> dict[str, str]:
    """The link of each alert in the installed rules."""
    groups = yaml.safe_load((share / "prometheus" / "whaled.alerts.rules.yml").read_text())["groups"]
    return {rule["alert"]: rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"]}


def headings(page: Path) -> set[str]:
    """What a link into a page can name."""
    return {heading.lower() for heading in re.findall(r"^#+ (\w+)$", page.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("prefix", ["/opt/whaled", "/usr/lib/whaled"])
def test_each_runbook_link_leads_to_a_section_of_an_installed_page(tmp_path: Path, prefix: str) -> None:
    done = make_share(tmp_path, f"PREFIX={prefix}")
    assert done.returncode == 0, done.stderr
    share = tmp_path / prefix.strip("/") / "share"
    urls = runbook_urls(share)
    assert len(urls) > 30
    for alert, url in urls.items():
        parts = urlsplit(url)
        assert (parts.scheme, parts.path) == ("file", f"{prefix}/share/docs/runbook.md")
        page = tmp_path / parts.path.strip("/")
        assert parts.fragment == alert.lower()
        assert parts.fragment in headings(page)


def test_the_location_of_the_runbook_is_configurable(tmp_path: Path) -> None:
    done = make_share(tmp_path, "DOCS_URL=https://wiki.example.org/ops/whaled/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"whaled: pages, rules and dashboards are in {tmp_path}/opt/whaled/share; "
        "runbook links lead to https://wiki.example.org/ops/whaled/runbook.md\n"
    )
    urls = runbook_urls(tmp_path / "opt/whaled/share")
    assert {url.partition("#")[0] for url in urls.values()} == {"https://wiki.example.org/ops/whaled/runbook.md"}


@pytest.mark.parametrize(
    "url", ["wiki/whaled", "https://", "https://x/a b", "https://x/?page=", "https://x/|y", "file://x"]
)
def test_a_url_that_no_link_can_begin_with_is_refused(tmp_path: Path, url: str) -> None:
    done = make_share(tmp_path, f"DOCS_URL={url}")
    assert done.returncode != 0
    assert f"whaled: DOCS_URL is {url}: " in done.stderr
    assert not any(tmp_path.iterdir())


def test_the_installed_pages_have_no_broken_links_and_are_world_readable(tmp_path: Path) -> None:
    assert make_share(tmp_path).returncode == 0
    share = tmp_path / "opt/whaled/share"
    assert {path.name for path in share.iterdir()} == {"docs", "grafana", "prometheus", "whaled.example.yaml"}
    broken = [
        (page.name, target)
        for page in (share / "docs").glob("*.md")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
    names = {path.name for path in (share / "grafana" / "dashboards").iterdir()}
    assert names == {"overview.json", "delivery.json", "upstream.json"}
    modes = {path.stat().st_mode & 0o777 for path in share.rglob("*") if path.is_file()}
    assert modes == {0o644}
