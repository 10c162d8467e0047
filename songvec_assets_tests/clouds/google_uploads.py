"""Uploads of Google's XML API, which the client speaks, as those of its JSON API, which fake-gcs-server knows.

    python -m songvec_assets_tests.clouds.google_uploads PORT http://127.0.0.1:SERVER_PORT

A process. Conditions become parameters that the server itself compares; pieces of a large upload are joined here. All
else goes to the server as it came.
"""

import json
import sys
import urllib.parse
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import aiohttp
import yarl
from aiohttp import web

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_META = "x-goog-meta-"
_BOUNDARY = "piece"


@dataclass
class Uploads:
    """See the module.

    Attributes:
        server: URL of fake-gcs-server.
        pieces: of uploads in pieces that have begun, by their ids and numbers.
    """

    server: str
    pieces: defaultdict[str, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    session: aiohttp.ClientSession | None = None

    async def hold_session(self, _: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(auto_decompress=False) as self.session:
            yield

    async def serve(self, request: web.Request) -> web.Response:
        query, body = request.query, await request.read()
        bucket, _, key = urllib.parse.unquote(request.rel_url.raw_path).lstrip("/").partition("/")
        if request.method not in ("PUT", "POST") or not key:
            return await self._forward(request, body)
        if "uploads" in query:
            begun = f"<UploadId>{uuid.uuid4().hex}</UploadId>"
            content = f"<InitiateMultipartUploadResult>{begun}</InitiateMultipartUploadResult>"
            return web.Response(text=content, content_type="application/xml")
        if "partNumber" in query:
            self.pieces[query["uploadId"]][int(query["partNumber"])] = body
            return web.Response(headers={"ETag": f'"{query["partNumber"]}"'})
        if "uploadId" not in query:
            return await self._put(bucket, key, body, request.headers)
        pieces = self.pieces.pop(query["uploadId"])
        answer = await self._put(bucket, key, b"".join(pieces[number] for number in sorted(pieces)), {})
        completed = f"<ETag>{answer.headers['ETag']}</ETag>"
        content = f"<CompleteMultipartUploadResult>{completed}</CompleteMultipartUploadResult>"
        return web.Response(text=content, headers=answer.headers, content_type="application/xml")

    async def _put(self, bucket: str, key: str, body: bytes, headers: Mapping[str, str]) -> web.Response:
        given = {name.lower(): value for name, value in headers.items()}
        parameters = {"uploadType": "multipart", "name": key}
        if "x-goog-if-generation-match" in given:
            parameters["ifGenerationMatch"] = given["x-goog-if-generation-match"]
        metadata = {name.removeprefix(_META): value for name, value in given.items() if name.startswith(_META)}
        described = json.dumps({"name": key, "metadata": metadata}).encode()
        parts = [b"Content-Type: application/json\r\n\r\n" + described, b"\r\n" + body]
        content = b"".join(f"--{_BOUNDARY}\r\n".encode() + part + b"\r\n" for part in parts)
        assert self.session
        async with self.session.post(
            f"{self.server}/upload/storage/v1/b/{bucket}/o",
            params=parameters,
            headers={"Content-Type": f"multipart/related; boundary={_BOUNDARY}"},
            data=content + f"--{_BOUNDARY}--\r\n".encode(),
        ) as answer:
            if answer.status != 200:
                return web.Response(status=answer.status, body=await answer.read())
            made = await answer.json()
        return web.Response(headers={"ETag": f'"{made["etag"]}"', "x-goog-generation": made["generation"]})

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        assert self.session
        url = yarl.URL(f"{self.server}{request.raw_path}", encoded=True)
        kept = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        async with self.session.request(request.method, url, headers=kept, data=body) as answer:
            content = await answer.read()
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            if request.method == "HEAD":
                headers["Content-Length"] = answer.headers.get("Content-Length", "0")
        return web.Response(status=answer.status, headers=headers, body=content)


def main() -> None:
    """Serve until killed."""
    uploads = Uploads(sys.argv[2])
    app = web.Application(client_max_size=1 << 30)
    app.cleanup_ctx.append(uploads.hold_session)
    app.router.add_route("*", "/{path:.*}", uploads.serve)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)


if __name__ == "__main__":
    main()
