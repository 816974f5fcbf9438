"""Open COUNT authenticated connections that stay until SIGTERM, and print the responses as JSON lines.

python flood.py URL TOKEN_FILE COUNT
"""

import asyncio
import base64
import json
import secrets
import signal
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

AT_A_TIME = 50
PROGRESS_EVERY = 100


async def visit(host: str, port: int, token: str) -> tuple[str, asyncio.StreamWriter]:
    """Connect and send the handshake; return the response's status code, or "cut off", and the open connection."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
        f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64.b64encode(secrets.token_bytes(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n"
        f"Authorization: Bearer {token}\r\n\r\n".encode()
    )
    try:
        line = await reader.readline()
    except OSError:
        line = b""
    return (line.split()[1].decode() if line else "cut off"), writer


async def main(url: str, token: str, count: int) -> None:
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 0
    answers: Counter[str] = Counter()
    staying: list[asyncio.StreamWriter] = []
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    left = iter(range(count))

    async def keep_visiting() -> None:
        for number in left:
            if stopping.is_set():
                return
            answer, writer = await visit(host, port, token)
            answers[answer] += 1
            staying.append(writer)
            if number % PROGRESS_EVERY == 0:
                print(json.dumps({"kind": "progress", "answers": answers}), flush=True)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_A_TIME):
            tasks.create_task(keep_visiting())
    print(json.dumps({"kind": "all", "answers": answers}), flush=True)
    await stopping.wait()


asyncio.run(main(sys.argv[1], Path(sys.argv[2]).read_text().strip(), int(sys.argv[3])))
