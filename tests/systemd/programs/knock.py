"""Connect clients continuously; each closes its connection after the handshake.

python knock.py URL [ONCE]: prints failures as JSON lines, and the counts at SIGTERM; with ONCE, one client's outcome.
"""

import asyncio
import json
import signal
import sys
import time
from collections import Counter

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

AT_A_TIME = 12
PATIENCE_S = 60


async def knock(url: str) -> str:
    """Connect one client and return the outcome of its handshake."""
    try:
        client = await connect(url, proxy=None, compression=None, open_timeout=PATIENCE_S, close_timeout=2)
    except ConnectionRefusedError:
        return "refused"
    except InvalidStatus as answer:
        return f"status {answer.response.status_code}"
    except TimeoutError:
        return "timed out"
    except (OSError, EOFError, InvalidHandshake) as error:
        return f"cut off: {type(error).__name__}"
    await client.close()
    return "ok"


async def main(url: str) -> None:
    outcomes: Counter[str] = Counter()
    worst_s = 0.0
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)

    async def come_and_go() -> None:
        nonlocal worst_s
        while not stopping.is_set():
            began = time.monotonic()
            outcome = await knock(url)
            worst_s = max(worst_s, time.monotonic() - began)
            outcomes[outcome] += 1
            if outcome != "ok":
                print(json.dumps({"kind": "trouble", "outcome": outcome}), flush=True)
            elif outcomes["ok"] == 1:
                print(json.dumps({"kind": "first"}), flush=True)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_A_TIME):
            tasks.create_task(come_and_go())
    print(json.dumps({"kind": "sum", "outcomes": outcomes, "worst_s": round(worst_s, 2)}), flush=True)


async def once(url: str) -> None:
    began = time.monotonic()
    print(json.dumps({"kind": "trying"}), flush=True)
    outcome = await knock(url)
    print(json.dumps({"kind": "once", "outcome": outcome, "waited_s": round(time.monotonic() - began, 2)}), flush=True)


asyncio.run(once(sys.argv[1]) if len(sys.argv) > 2 else main(sys.argv[1]))
