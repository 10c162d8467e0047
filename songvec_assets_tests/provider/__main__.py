"""`python -m songvec_assets_tests.provider`: the command line and the life of the process."""

import argparse
import asyncio
import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from .endpoint import Endpoint
from .faults import Faults
from .ledger import Ledger
from .server import Server

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m songvec_assets_tests.provider")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--api-key", default="test-key")
    parser.add_argument("--model", default="fireworks/qwen3-embedding-8b")
    parser.add_argument("--control", default="{}", help="faults to begin with, as `PUT /control` takes them")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="append a JSON line a billed request")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when stdin ends")
    return parser.parse_args()


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT, or until stdin ends if that was asked for."""
    # Responses of megabytes would otherwise be mapped and unmapped each time: twice the CPU time a vector.
    with suppress(AttributeError):  # only glibc has it
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**29)
    faults = msgspec.json.decode(arguments.control, type=Faults)
    ledger = Ledger(arguments.ledger.open("ab", buffering=0) if arguments.ledger else None)
    endpoint = Endpoint(arguments.api_key, arguments.model, faults, ledger)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, ended.set)
    if arguments.exit_with_parent:
        # A pipe from the parent ends with it, however it dies: the kernel closes it.
        loop.add_reader(sys.stdin, lambda: None if os.read(0, 4096) else ended.set())
    server = await asyncio.start_server(Server(endpoint).converse, "127.0.0.1", arguments.port, limit=2**20)
    port = server.sockets[0].getsockname()[1]
    print(f"listening on http://127.0.0.1:{port}/v1", flush=True)
    await ended.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(serve(parse_arguments()))
