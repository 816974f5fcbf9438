"""whaled as an operator runs it: installed, configured and started by systemd, next to a simulated backend."""

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
OWN = "/run/lab"  # the directory for files of the tests
TOKEN_FILE = f"{OWN}/token"
FAULTS = f"{OWN}/faults"

GET = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], sys.argv[2].encode() or None, 5).read().decode())"

# Shorter delays and timeouts, and no limit per address: all clients of the lab have the same address.
QUICK: Mapping[str, Mapping[str, object]] = {
    "upstream": {"url": "ws://127.0.0.1:8999/api/v1/ws", "reconnect_initial": "100ms", "reconnect_max": "300ms"},
    "gateway": {"max_connections_per_address": 10_000, "drain_window": "3s", "close_timeout": "1s"},
    "canary": {"interval": "500ms", "deadline": "1s", "lost_after": "1s"},
}


class Program:
    """A test program that runs in the lab as a separate unit and writes JSON lines.

    A second one of the same program at the same time needs another name: `called`.
    """

    def __init__(self, lab: Lab, name: str, *argv: str, called: str | None = None) -> None:
        self._lab = lab
        self._unit = f"lab-{called or name}.service"
        self._output = f"{OWN}/{called or name}.jsonl"
        program = lab.project / "tests" / "systemd" / "programs" / f"{name}.py"
        lab.systemctl("stop", self._unit, check=False)
        lab.run(
            # With `exec`, systemd-run returns once the program runs, so that no line of an earlier one is read.
            "systemd-run", "--quiet", "--collect", "--service-type=exec", "--unit", self._unit,
            "--property", f"StandardOutput=truncate:{self._output}", "--property", "StandardError=journal",
            "--property", "LimitNOFILE=16384", PYTHON, str(program), *argv,
        )  # fmt: skip

    def lines(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the lines written so far, all or those of these kinds."""
        path = self._lab.path(self._output)
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [json.loads(line) for line in whole if line.endswith("\n")]
        return [line for line in lines if not kinds or line["kind"] in kinds]

    def until(self, kind: str, count: int = 1, timeout: float = 30, **fields: object) -> list[dict[str, Any]]:
        """Wait for at least `count` lines of a kind with these fields, and return them."""

        def found() -> list[dict[str, Any]]:
            matching = [line for line in self.lines(kind) if fields.items() <= line.items()]
            return matching if len(matching) >= count else []

        try:
            return self._lab.until(found, timeout)
        except AssertionError:
            log = self._lab.run("journalctl", "--unit", self._unit, "--output", "cat", "--lines", "20").stdout
            raise AssertionError(f"no {count} {kind} {fields}: {self.lines()[-10:]}\n{log}") from None

    def stop(self) -> list[dict[str, Any]]:
        """Stop the program and return all its lines."""
        self._lab.systemctl("stop", self._unit)
        return self.lines()


class Installation:
    """The installed whaled, and an operator's actions on it."""

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
        """Write the configuration shared by all tests, with the keys in these sections overriding it."""
        merged = {name: {**QUICK.get(name, {}), **sections.get(name, {})} for name in {**QUICK, **sections}}
        self.write_config(yaml.safe_dump(merged))

    def write_config(self, text: str) -> None:
        """Write the configuration file."""
        self._written = text
        self.lab.write(CONFIG, text)

    def drop_in(self, text: str) -> None:
        """Install a drop-in for the unit, or remove it if the text is empty."""
        self._dropped_in = text
        if text:
            self.lab.write(DROP_IN, text)
        else:
            self.lab.run("rm", "-f", DROP_IN)
        self.lab.systemctl("daemon-reload")

    def undo_drop_in(self) -> None:
        """Remove the drop-in, and stop a whaled that runs with it."""
        if self._dropped_in:
            self.drop_in("")
            self.lab.systemctl("stop", "whaled.service", check=False)

    def reset(self) -> None:
        """Restore the state at the start of every test: the shared configuration, running units, a running backend."""
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
        """Start a backend with a whale about every 100 ms.

        It has no blocks and no replacements, so that whaled alerts each whale from the stream instead of finding it in
        a block. Its transactions differ on each start, since whaled does not alert the same ones again.
        """
        self.lab.run(
            "systemd-run", "--quiet", "--collect", "--unit", "simulator.service",
            WHALED, "simulate", "--port", "8999", "--rate", "20", "--whale-share", "0.4",
            "--poll-interval", "0.2", "--block-interval", "0", "--events", "0",
        )  # fmt: skip
        self.lab.until(lambda: self.get(f"{SIMULATOR}/simulator"), what="a simulator")

    def send_whale(self, btc: float) -> str:
        """Send a transaction of exactly this amount and return its txid."""
        sent = self.get(f"{SIMULATOR}/simulator/send", json.dumps({"btc": btc}))
        return str(json.loads(sent)["txid"])

    # --- the state of whaled ---

    def get(self, url: str, body: str = "") -> str:
        """Return the body of an HTTP response inside the lab, empty if there is no response."""
        return self.lab.run(PYTHON, "-c", GET, url, body, check=False).stdout

    def metrics(self) -> dict[str, float]:
        """Return every sample, by name and labels as Prometheus writes them."""
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get(f"{HTTP}/metrics")):
            for sample in family.samples:
                labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def is_active(self, unit: str) -> bool:
        """Return whether systemd reports the unit as active."""
        return self.lab.systemctl("is-active", "--quiet", unit, check=False).returncode == 0

    def status_text(self) -> str:
        """Return the STATUS= line."""
        return self.lab.show("whaled", "StatusText")["StatusText"]

    def main_pid(self) -> int:
        """Return the daemon's process id inside the lab."""
        return int(self.lab.show("whaled", "MainPID")["MainPID"])

    def restarts(self) -> int:
        """Return the number of automatic restarts by systemd."""
        return int(self.lab.show("whaled", "NRestarts")["NRestarts"])

    def signal(self, name: str) -> None:
        """Send a signal to the daemon's main process."""
        self.lab.systemctl("kill", f"--signal={name}", "--kill-who=main", "whaled.service")

    def secrets(self) -> list[str]:
        """Return the strings that no log line may contain: the key ring's secrets, the token and its signature."""
        ring = self.lab.run("cat", KEY_RING).stdout
        material = re.findall(r'"secret"\s*:\s*"([^"]+)"', ring)
        assert material, "the format of the key ring's file has changed: correct this test"
        return [*material, self.token, self.token.rsplit(".", maxsplit=1)[1]]

    # --- clients ---

    def follow(self) -> Program:
        """Start a client that stays connected, and wait until it is subscribed."""
        client = Program(self.lab, "follow", URL, TOKEN_FILE)
        client.until("connected")
        return client
