"""whaled as an operator has it: installed, configured, run by systemd, with a simulated backend beside it."""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from systemd.lab import Lab

CONFIG = "/etc/whaled/whaled.yaml"
KEY_RING = "/etc/whaled/keys.json"
PYTHON = "/opt/whaled/venv/bin/python"
WHALED = "/opt/whaled/venv/bin/whaled"
URL = "ws://127.0.0.1:8765"
HTTP = "http://127.0.0.1:9108"
SIMULATOR = "http://127.0.0.1:8999"
UNITS = ("whaled.socket", "whaled.service")
DROP_IN = "/run/systemd/system/whaled.service.d/90-test.conf"
OWN = "/run/lab"  # what tests put into the lab
TOKEN_FILE = f"{OWN}/token"
FAULTS = f"{OWN}/faults"

GET = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], sys.argv[2].encode() or None, 5).read().decode())"

# Everything that takes its time takes less of it. Clients all come from one address here.
QUICK: Mapping[str, Mapping[str, object]] = {
    "upstream": {"url": "ws://127.0.0.1:8999/api/v1/ws", "reconnect_initial": "100ms", "reconnect_max": "300ms"},
    "gateway": {"max_connections_per_address": 10_000, "drain_window": "3s", "close_timeout": "1s"},
    "canary": {"interval": "500ms", "deadline": "1s", "lost_after": "1s"},
}


class Program:
    """A program of ours that runs in the lab as a unit of its own and writes JSON lines."""

    def __init__(self, lab: Lab, name: str, *argv: str) -> None:
        self._lab = lab
        self._unit = f"lab-{name}.service"
        self._output = f"{OWN}/{name}.jsonl"
        program = lab.project / "tests" / "systemd" / "programs" / f"{name}.py"
        lab.systemctl("stop", self._unit, check=False)
        lab.run(
            # `exec`: back once it runs, so that no line of the one before is read.
            "systemd-run", "--quiet", "--collect", "--service-type=exec", "--unit", self._unit,
            "--property", f"StandardOutput=truncate:{self._output}", "--property", "StandardError=journal",
            "--property", "LimitNOFILE=16384", PYTHON, str(program), *argv,
        )  # fmt: skip

    def lines(self, *kinds: str) -> list[dict[str, Any]]:
        """What it has written so far, of these kinds."""
        path = self._lab.path(self._output)
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [json.loads(line) for line in whole if line.endswith("\n")]
        return [line for line in lines if not kinds or line["kind"] in kinds]

    def until(self, kind: str, count: int = 1, timeout: float = 30, **fields: object) -> list[dict[str, Any]]:
        """Wait for so many lines of a kind with these fields."""

        def found() -> list[dict[str, Any]]:
            fitting = [line for line in self.lines(kind) if fields.items() <= line.items()]
            return fitting if len(fitting) >= count else []

        try:
            return self._lab.until(found, timeout)
        except AssertionError:
            said = self._lab.run("journalctl", "--unit", self._unit, "--output", "cat", "--lines", "20").stdout
            raise AssertionError(f"no {count} {kind} {fields}: {self.lines()[-10:]}\n{said}") from None

    def stop(self) -> list[dict[str, Any]]:
        """SIGTERM, and what it wrote in all."""
        self._lab.systemctl("stop", self._unit)
        return self.lines()


class Installation:
    """The installed whaled, and what an operator does with it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._written = ""
        self._dropped_in = ""
        lab.run("mkdir", "-p", OWN, FAULTS)
        faults = (lab.project / "tests" / "systemd" / "faults" / "sitecustomize.py").read_text()
        lab.write(f"{FAULTS}/sitecustomize.py", faults)
        token = lab.run(WHALED, "token", "issue", "--client", "lab", "--ttl", "1h", "--key-ring", KEY_RING)
        self.token = token.stdout.strip()
        lab.write(TOKEN_FILE, self.token, 0o600)

    # --- configuration ---

    def configure(self, **sections: Mapping[str, object]) -> None:
        """Write the configuration: that of all tests, with these sections laid over it."""
        merged = {name: {**QUICK.get(name, {}), **sections.get(name, {})} for name in {**QUICK, **sections}}
        self.write_config(yaml.safe_dump(merged))

    def write_config(self, text: str) -> None:
        """Write the configuration file."""
        self._written = text
        self.lab.write(CONFIG, text)

    def drop_in(self, text: str) -> None:
        """Change the unit; none if empty."""
        self._dropped_in = text
        if text:
            self.lab.write(DROP_IN, text)
        else:
            self.lab.run("rm", "-f", DROP_IN)
        self.lab.systemctl("daemon-reload")

    def undo_drop_in(self) -> None:
        """The units as installed. A whaled that has what was dropped in is stopped."""
        if self._dropped_in:
            self.drop_in("")
            self.lab.systemctl("stop", "whaled.service", check=False)

    def reset(self) -> None:
        """Everything as at the beginning of every test: the usual configuration, units running, the backend too."""
        before = (self._written, self._dropped_in)
        self.undo_drop_in()
        self.configure()
        if not self.is_active("simulator.service"):
            self.start_simulator()
        if before != (self._written, self._dropped_in) or not self.is_active("whaled.service"):
            self.lab.systemctl("stop", "whaled.service", check=False)
            self.lab.systemctl("start", *UNITS)
        self.lab.until(lambda: self.metrics().get('whaled_upstream_state{state="connected"}'), what="a backend")

    # --- the backend ---

    def start_simulator(self) -> None:
        """A whale every 100 ms or so. No block and no replacement: what is sent must be alerted, not found in a block.

        The world is another one each time: the same transactions again would be no news to whaled.
        """
        self.lab.run(
            "systemd-run", "--quiet", "--collect", "--unit", "simulator.service",
            WHALED, "simulate", "--port", "8999", "--rate", "20", "--whale-share", "0.4",
            "--poll-interval", "0.2", "--block-interval", "0", "--events", "0",
        )  # fmt: skip
        self.lab.until(lambda: self.get(f"{SIMULATOR}/simulator"), what="a simulator")

    def send_whale(self, btc: float) -> str:
        """A transaction of exactly this sum; its id."""
        sent = self.get(f"{SIMULATOR}/simulator/send", json.dumps({"btc": btc}))
        return str(json.loads(sent)["txid"])

    # --- what it tells ---

    def get(self, url: str, body: str = "") -> str:
        """What HTTP in the lab answers; nothing if nobody does."""
        return self.lab.run(PYTHON, "-c", GET, url, body, check=False).stdout

    def metrics(self) -> dict[str, float]:
        """Every sample, by name and labels as Prometheus writes them."""
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get(f"{HTTP}/metrics")):
            for sample in family.samples:
                labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def is_active(self, unit: str) -> bool:
        """Whether systemd calls it active."""
        return self.lab.systemctl("is-active", "--quiet", unit, check=False).returncode == 0

    def status_text(self) -> str:
        """The STATUS= line."""
        return self.lab.show("whaled", "StatusText")["StatusText"]

    def main_pid(self) -> int:
        """The daemon's process id as the lab counts."""
        return int(self.lab.show("whaled", "MainPID")["MainPID"])

    def restarts(self) -> int:
        """How often systemd restarted it by itself."""
        return int(self.lab.show("whaled", "NRestarts")["NRestarts"])

    def signal(self, name: str) -> None:
        """Send a signal to the daemon itself."""
        self.lab.systemctl("kill", f"--signal={name}", "--kill-who=main", "whaled.service")

    def secrets(self) -> list[str]:
        """What must never be in a log line: every long value of the key ring that is no name, and the token's seal."""
        ring = self.lab.run("cat", KEY_RING).stdout
        material = re.findall(r'"secret"\s*:\s*"([^"]+)"', ring)
        assert material, "the key ring's file has another shape now: mend this test"
        return [*material, self.token, self.token.rsplit(".", maxsplit=1)[1]]

    # --- clients ---

    def follow(self) -> Program:
        """A client that stays, once it is subscribed."""
        client = Program(self.lab, "follow", URL, TOKEN_FILE)
        client.until("connected")
        return client
