"""Open COUNT connections from many addresses that send nothing, and hold them until SIGTERM.

python silent.py PORT COUNT
"""

import json
import signal
import socket
import sys

PER_ADDRESS = 100


def main(port: int, count: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    held = []
    for number in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind((f"127.9.{number // PER_ADDRESS}.1", 0))
        sock.connect_ex(("127.0.0.1", port))
        held.append(sock)
    print(json.dumps({"kind": "all", "opened": len(held)}), flush=True)
    signal.sigwait({signal.SIGTERM})


main(int(sys.argv[1]), int(sys.argv[2]))
