"""Follow a stream and print every event as a JSON line.

Usage: python follow.py URL TOKEN_FILE
"""

import asyncio
import json
import signal
import sys
from pathlib import Path

from whaled.client import Connected, Disconnected, Missed, Retry, UpstreamStatus, WhaleAlert, WhaleStream, WhaleUpdate


def report(kind: str, **fields: object) -> None:
    print(json.dumps({"kind": kind, **fields}), flush=True)


async def follow(url: str, token: str) -> None:
    retry = Retry(initial_s=0.2, max_s=1.0)
    async with WhaleStream(url, token=token, link_events=True, retry=retry) as stream:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stream.stop)
        async for event in stream:
            match event:
                case WhaleAlert(data=whale, position=at):
                    report("alert", epoch=at.epoch, offset=at.offset, txid=whale.transaction_id, btc=whale.btc_value)
                case WhaleUpdate(data=news, position=at):
                    report("update", epoch=at.epoch, offset=at.offset, txid=news.transaction_id)
                case Connected():
                    report("connected", recovered=event.is_recovered)
                case Disconnected():
                    report("disconnected", reason=event.reason, code=event.code)
                case UpstreamStatus():
                    report("upstream", state=event.state)
                case Missed():
                    report("missed")
                case _:
                    pass


asyncio.run(follow(sys.argv[1], Path(sys.argv[2]).read_text().strip()))
