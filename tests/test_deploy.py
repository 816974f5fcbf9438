"""What is shipped beside the program can be read."""

from pathlib import Path

import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"


def test_shipped_yaml_is_yaml() -> None:
    for path in DEPLOY.rglob("*.y*ml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
