"""HTTP/1.1 on asyncio streams: the endpoint, the control, the ledger, and broken deliveries.

By hand, because a server library would not reset, cut or stall a response. Requests need a Content-Length.
"""

import asyncio
import socket
import struct
from contextlib import suppress
from http.client import responses

import msgspec

from .endpoint import Answer, Endpoint, RefusedError
from .faults import FaultPlan, Faults
from .ledger import Ledger

_POLL_S = 0.05


class Server:
    """Speaks HTTP for one endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until either side ends it (the callback of `asyncio.start_server`)."""
        # Cancelled only at the end of the process, where asyncio would print a traceback a connection.
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            is_first = True
            while await self._exchange(reader, writer, is_first):
                is_first = False
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_first: bool) -> bool:
        """One request and its response; whether the connection stays open."""
        request_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, path, _ = request_line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        faults = self._endpoint.plan.faults
        if path == "/v1/embeddings" and method == "POST":
            if faults.idle == "reset" and not is_first:
                self._endpoint.ledger.answer(0)
                await _send(writer, Answer(0, b"", delivery="reset"))
                return False
            if not await self._load(reader):
                return False
            answer = await self._embed(headers, body, writer)
        else:
            answer = self._serve_control(method, path, body)
            await _send(writer, answer)
        if answer.delivery == "stall":
            # Reading ends when the client hangs up, so that abandoned connections do not pile up.
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), self._endpoint.plan.faults.stall_s)
        return answer.delivery == "whole" and headers.get("connection") != "close" and faults.idle != "closed"

    async def _embed(self, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> Answer:
        endpoint = self._endpoint  # another one may begin meanwhile
        endpoint.n_in_flight += 1
        endpoint.ledger.arrive(endpoint.n_in_flight)
        try:
            try:
                answer = await endpoint.embed(headers, body)
            except RefusedError as refusal:
                answer = refusal.answer_as(endpoint.plan.faults)
            except msgspec.DecodeError as error:
                answer = RefusedError(400, str(error)).answer
            endpoint.ledger.answer(answer.status)
            await _send(writer, answer)
        finally:
            endpoint.n_in_flight -= 1
        return answer

    async def _load(self, reader: asyncio.StreamReader) -> bool:
        """Load the model for the first request; False where the client hung up, which aborts that."""
        plan = self._endpoint.plan
        if plan.is_warm:
            return True
        self._endpoint.ledger.figures.loads += 1
        waited_s = 0.0
        while waited_s < plan.faults.cold_s:
            if reader.at_eof() or reader.exception():
                return False
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S
        plan.is_warm = True
        return True

    def _serve_control(self, method: str, path: str, body: bytes) -> Answer:
        endpoint = self._endpoint
        found: object = {"status": "ok"}
        match method, path:
            case "GET", "/v1/embeddings" if self._endpoint.plan.faults.redirect is not None:
                return Answer(301, b"", {"location": self._endpoint.plan.faults.redirect})
            case "GET", "/health":
                pass
            case "PUT", "/control":
                try:
                    plan = FaultPlan(msgspec.json.decode(body, type=Faults))
                except msgspec.DecodeError as error:
                    return RefusedError(400, str(error)).answer
                endpoint.plan.released.set()
                endpoint.plan = plan
            case "PUT", "/new":
                endpoint.plan.released.set()
                self._endpoint = endpoint.begin_again()
            case "GET", "/ledger":
                found = endpoint.ledger.figures
            case "GET", "/ledger/texts":
                found = endpoint.ledger.texts()
            case "DELETE", "/ledger":
                endpoint.ledger = Ledger(endpoint.ledger.file)
            case "POST", "/api/embeddings" if endpoint.plan.faults.native_at_api:
                found = {"embedding": []}
            case "POST", "/api/embed/embeddings" if endpoint.plan.faults.native_at_api:
                return RefusedError(404, "404 page not found").answer
            case "POST", _ if endpoint.plan.faults.wrong_path_200:
                found = {"error": f"Unexpected endpoint or method. ({method} {path})"}
            case _:
                return RefusedError(404, f"no {method} {path} here").answer
        return Answer(200, msgspec.json.encode(found))


async def _send(writer: asyncio.StreamWriter, answer: Answer) -> None:
    """Send an answer, or as much of it as its delivery allows."""
    if answer.delivery == "reset":
        # A linger of zero seconds turns the close into a TCP RST.
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
        return
    headers = {"content-type": "application/json", "content-length": len(answer.body), **answer.headers}
    head = [f"HTTP/1.1 {answer.status} {responses.get(answer.status, '')}", *(f"{k}: {v}" for k, v in headers.items())]
    writer.write("\r\n".join([*head, "\r\n"]).encode())
    whole = answer.delivery == "whole"
    writer.write(answer.body if whole else answer.body[: len(answer.body) // 2])
    await writer.drain()
