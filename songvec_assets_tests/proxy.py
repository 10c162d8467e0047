"""A TCP proxy in a thread of its own, before a server: it can hold what clients send, or drop their connections.

Bytes are counted over all connections, from the moment they are asked for: those that clients send, or those that the
server answers.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Literal

Direction = Literal["sent", "answered"]

_RESET = struct.pack("ii", 1, 0)
_PIECE = 1 << 16


class Proxy:
    """Forwards connections on `port` of 127.0.0.1; see `running_proxy`.

    Attributes:
        port: where it listens.
        n_dropped: connections that it reset.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._ended = asyncio.Event()
        self._left: dict[Direction, float] = {"sent": float("inf"), "answered": float("inf")}
        self._then: Callable[[], None] = self._reset_all
        self._writers: set[asyncio.StreamWriter] = set()
        self._holding = threading.Event()
        self.n_dropped = 0
        self.port = 0

    def hold_after(self, n_bytes: int) -> None:
        """Once clients have sent so many more bytes, forward nothing that they send, until `release`."""
        self._call(self._arm, "sent", n_bytes, self._hold)

    def drop_after(self, n_bytes: int, of: Direction = "sent") -> None:
        """Once so many more bytes went by, reset every connection, once; those made afterwards pass."""
        self._call(self._arm, of, n_bytes, self._reset_all)

    def drop(self) -> None:
        """Reset every connection now."""
        self._call(self._reset_all)

    def release(self) -> None:
        """Forward again what was held."""
        self._call(self._release)

    @property
    def holding(self) -> bool:
        """Whether it holds what clients send."""
        return self._holding.is_set()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        done = threading.Event()

        def call() -> None:
            function(*arguments)
            done.set()

        self._loop.call_soon_threadsafe(call)
        if not done.wait(10):
            raise RuntimeError("the proxy's thread does not answer")

    def _arm(self, direction: Direction, n_bytes: int, then: Callable[[], None]) -> None:
        self._left = {"sent": float("inf"), "answered": float("inf")} | {direction: n_bytes}
        self._then = then

    def _hold(self) -> None:
        self._open.clear()
        self._holding.set()

    def _release(self) -> None:
        self._open.set()
        self._holding.clear()

    def _reset_all(self) -> None:
        for writer in self._writers:
            # an answer of the kernel as after a crash or a firewall's timeout, instead of an orderly end
            with contextlib.suppress(OSError):  # where it was closed meanwhile
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
            self.n_dropped += 1

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
            mine = {writer, to_server}
            self._writers |= mine
            try:
                pumps = [
                    asyncio.create_task(self._pump(reader, to_server, "sent")),
                    asyncio.create_task(self._pump(from_server, writer, "answered")),
                ]
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                # what the server still says to a client that left reaches nobody; what it said last was forwarded
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                self._writers -= mine
                to_server.close()
        writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(_PIECE):
                at = 0
                while at < len(piece):
                    if direction == "sent":
                        await self._open.wait()
                    n_bytes = int(min(len(piece) - at, self._left[direction]))
                    sink.write(piece[at : at + n_bytes])
                    await sink.drain()
                    at += n_bytes
                    self._left[direction] -= n_bytes
                    if not self._left[direction]:
                        self._left[direction] = float("inf")
                        self._then()

    async def _listen(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        async with server:
            await self._ended.wait()
        self._release()
        self._reset_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(tasks, timeout=5) if tasks else None

    def run(self, ready: threading.Event) -> None:
        """Serve in the calling thread, until `end`."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen(ready))

    def end(self) -> None:
        """Reset what is open, and listen no more."""
        self._loop.call_soon_threadsafe(self._ended.set)


@contextlib.contextmanager
def running_proxy(target_port: int) -> Iterator[Proxy]:
    """A proxy before a port of 127.0.0.1, for the block."""
    proxy, ready = Proxy(target_port), threading.Event()
    thread = threading.Thread(target=proxy.run, args=(ready,), daemon=True, name="proxy")
    thread.start()
    try:
        if not ready.wait(10):
            raise RuntimeError("the proxy does not listen")
        yield proxy
    finally:
        proxy.end()
        thread.join(10)
