"""The proxy before an S3 server, as a process: forwards, counts, and spoils what its faults name.

    python -m songvec_assets_tests.s3.proxy PORT http://127.0.0.1:SERVER_PORT

Under `/-/` it is asked itself: faults are put, the log is read or taken. All else goes to the server as it came, with
the Host header that was signed.
"""

import asyncio
import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import yarl
from aiohttp import web

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Fault:
    """What happens to some requests.

    Attributes:
        do: `answer` with status and body; `slow` by seconds; `reset` before it is served; `lose` the answer of a served
            request; `truncate` the answer's body, or `flip` a bit of it; `drop` a header; `hold` until the faults are
            replaced.
        method, match: of the requests: the method, and a pattern of path and query; empty: all.
        after: requests that match and pass first.
        times: how many it happens to; None: all.
        status, body, seconds, header: see `do`.
    """

    do: str
    method: str = ""
    match: str = ""
    after: int = 0
    times: int | None = None
    status: int = 500
    body: str = "<Error><Code>InternalError</Code><Message>spoilt</Message></Error>"
    seconds: float = 0.0
    header: str = ""

    def hits(self, method: str, path: str) -> bool:
        """Whether it happens to a request, which is counted."""
        if self.method not in ("", method) or not re.search(self.match, path) or self.times == 0:
            return False
        self.after -= 1
        if self.after >= 0:
            return False
        self.times = None if self.times is None else self.times - 1
        return True


@dataclass
class Proxy:
    """See the module."""

    server: str
    faults: list[Fault] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    session: aiohttp.ClientSession | None = None

    async def start(self, _: web.Application) -> None:
        self.session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=120))

    async def put_faults(self, request: web.Request) -> web.Response:
        self.faults = [Fault(**each) for each in json.loads(await request.read())]
        self.changed.set()
        self.changed = asyncio.Event()
        return web.Response()

    async def read_log(self, request: web.Request) -> web.Response:
        content = json.dumps(self.log)
        if request.method == "DELETE":
            self.log = []
        return web.Response(text=content, content_type="application/json")

    async def serve(self, request: web.Request) -> web.StreamResponse:
        body, path = await request.read(), request.raw_path
        entry = {"method": request.method, "path": path}
        self.log.append(entry)
        hits = [each for each in self.faults if each.hits(request.method, path)]
        does = {each.do: each for each in hits}
        if "slow" in does:
            await asyncio.sleep(does["slow"].seconds)
        if "hold" in does:
            await self.changed.wait()
        if "reset" in does:
            return self._break(request)
        if "answer" in does:
            fault = does["answer"]
            return web.Response(status=fault.status, text=fault.body, content_type="application/xml")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        for fault in hits:
            headers = {name: value for name, value in headers.items() if name.lower() != fault.header.lower()}
        assert self.session
        url = yarl.URL(f"{self.server}{path}", encoded=True)
        async with self.session.request(request.method, url, headers=headers, data=body) as answer:
            content, entry["status"] = await answer.read(), answer.status
            entry["n_bytes"] = len(content)
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            n_bytes = answer.headers.get("Content-Length", str(len(content)))
        if "lose" in does:
            return self._break(request)
        response = web.StreamResponse(status=answer.status, headers=kept)
        if answer.status != 204:
            response.headers["Content-Length"] = n_bytes if request.method == "HEAD" else str(len(content))
        await response.prepare(request)
        if "flip" in does and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if "truncate" in does:
            await response.write(content[: len(content) // 2])
            return self._break(request)
        if request.method != "HEAD":
            await response.write(content)
        await response.write_eof()
        return response

    def _break(self, request: web.Request) -> web.Response:
        assert request.transport
        request.transport.abort()
        return web.Response()


def main() -> None:
    """Serve until killed."""
    port, server = int(sys.argv[1]), sys.argv[2]
    proxy = Proxy(server)
    app = web.Application(client_max_size=1 << 30)
    app.on_startup.append(proxy.start)
    app.router.add_put("/-/faults", proxy.put_faults)
    app.router.add_route("*", "/-/log", proxy.read_log)
    app.router.add_route("*", "/{path:.*}", proxy.serve)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    main()
