"""`POST /v1/embeddings` as Fireworks AI answers it, from request bytes to an answer; no sockets here.

The order of refusals: key, told statuses, form, texts, quota. What passes is computed and billed; latency is
the computation's. Bodies of 404 and 429 as seen at Fireworks (facts read in November 2026).
"""

import asyncio
import gzip
import time
import unicodedata
from collections.abc import Mapping
from email.utils import formatdate
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pybase64
from numpy.typing import NDArray

from .faults import FaultPlan, Faults
from .ledger import Ledger
from .vectors import MIN_DIMENSIONS, count_tokens, digest_of, vector_of_digest

MAX_TEXTS = 2048
_INVALID = {"type": "invalid_request_error", "code": "invalid_request_error"}
_LIMITED = {"object": "error", **_INVALID, "message": "rate limit exceeded, please try again later"}
_MISSING = {"message": "Model not found, inaccessible, and/or not deployed", "code": "NOT_FOUND"}


class Answer(NamedTuple):
    """A response and how much of it reaches the client."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}
    delivery: Literal["whole", "reset", "truncate", "stall"] = "whole"


class RefusedError(Exception):
    """The request is answered with an error: a message in OpenAI's envelope, or a whole body."""

    def __init__(
        self,
        status: int,
        body: str | dict[str, Any],
        headers: Mapping[str, str] = {},
        after_s: float | None = None,
    ) -> None:
        super().__init__(status, body)
        body = {"error": {"message": body, **_INVALID}} if isinstance(body, str) else body
        retry = {} if after_s is None else {"retry-after": f"{after_s:g}"}
        self.answer = Answer(status, msgspec.json.encode(body), {**headers, **retry})

    def answer_as(self, faults: Faults) -> Answer:
        """The answer with its words and its time where this server puts them."""
        answer, headers = self.answer, dict(self.answer.headers)
        if faults.retry_after_date and "retry-after" in headers:
            headers["retry-after"] = formatdate(time.time() + float(headers["retry-after"]), usegmt=True)
        body = msgspec.json.decode(answer.body)
        error = body.get("error") if isinstance(body, dict) else None
        if isinstance(error, dict) and error.get("type") == "invalid_request_error":
            error |= {"type": faults.error_type, "code": faults.error_type}
            if faults.errors_as != "error":
                words = error["message"]
                body = {"detail": words if faults.errors_as == "detail" else [{"loc": ["body"], "msg": words}]}
        return answer._replace(body=msgspec.json.encode(body), headers=headers)


class EmbeddingsRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What a client may send."""

    model: str
    input: str | list[str]
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class Endpoint:
    """The embeddings endpoint of one account: its key, its model, its faults and its bill.

    Attributes:
        plan: the faults in force.
        ledger: what was asked and billed.
        n_in_flight: requests that are being answered.
    """

    def __init__(self, api_key: str, model: str, faults: Faults, ledger: Ledger) -> None:
        self._account = api_key, model
        self._authorization = f"Bearer {api_key}"
        self._models = {model, model.replace("fireworks/", "accounts/fireworks/models/", 1)}
        self._decoder = msgspec.json.Decoder(EmbeddingsRequest)
        self.plan = FaultPlan(faults)
        self.ledger = ledger
        self.n_in_flight = 0

    def begin_again(self) -> "Endpoint":
        """The same account without faults or bill; what this one still answers is billed here."""
        return Endpoint(*self._account, Faults(), Ledger(self.ledger.file))

    async def embed(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer one request.

        Raises:
            RefusedError: the request is not computed, and not billed.
            msgspec.DecodeError: likewise, as it is not a request for embeddings.
        """
        plan, faults = self.plan, self.plan.faults
        if faults.reset_when == "before" and plan.happens(faults.reset):
            return Answer(0, b"", delivery="reset")
        if strange := _answer_strangely(faults):
            return strange
        if headers.get("authorization") != self._authorization:
            raise RefusedError(401, "The API key you provided is invalid.")
        if told := plan.next_status():
            raise RefusedError(told.status, told.body or "told to fail", after_s=told.retry_after_s)
        request = self._decoder.decode(body)
        dimensions = self._check_form(request, faults)
        texts = [request.input] if isinstance(request.input, str) else request.input
        n_tokens = sum(map(count_tokens, texts))
        self.ledger.measure(len(texts), n_tokens)
        if fails := _check_texts(texts, n_tokens, faults):
            return fails
        headroom: dict[str, str] = {}
        if faults.quota:
            admitted, headroom = plan.admit(faults.quota, n_tokens)
            if not admitted:
                raise RefusedError(429, _LIMITED, headroom, faults.quota.retry_after_s)

        await plan.hold()
        await asyncio.sleep(plan.latency_s(body, n_tokens))
        digests = [digest_of(text) for text in texts]
        without = [_names(text, faults.nan) for text in texts]
        without = [each or (faults.nan_spoils and any(without)) for each in without]
        items = _compute_items(digests, without, dimensions, request.encoding_format == "base64", plan)
        self.ledger.bill(texts, digests, n_tokens, faults.keep_texts)
        if faults.reset_when == "after" and plan.happens(faults.reset):
            return Answer(0, b"", delivery="reset")
        usage = faults.usage.replace("{n}", str(n_tokens)).encode()
        envelope = b'{"object":"list","data":[%b],"model":%b%b}'
        usage = usage and b',"usage":' + usage
        response = envelope % (b",".join(items), msgspec.json.encode(request.model), usage)
        response = b"\xef\xbb\xbf" * faults.mark + response
        if faults.gzip:
            response, headroom = gzip.compress(response, 1), headroom | {"content-encoding": "gzip"}
        if faults.content_type != "application/json":
            headroom = headroom | {"content-type": faults.content_type}
        is_cut = plan.happens(faults.truncate)
        delivery: Literal["truncate", "stall", "whole"] = (
            "truncate" if is_cut else "stall" if plan.happens(faults.stall) else "whole"
        )
        return Answer(200, response, headroom, delivery)

    def _check_form(self, request: EmbeddingsRequest, faults: Faults) -> int:
        """The number of dimensions to answer with."""
        if request.model not in ({faults.model} if faults.model else self._models):
            raise RefusedError(404, {"error": _MISSING})
        asks_in_vain = faults.refuse_base64 and request.encoding_format == "base64"
        if asks_in_vain or (faults.refuse_encoding and request.encoding_format):
            raise RefusedError(faults.refuse_base64_status, faults.refuse_base64_words)
        if faults.refuse_dimensions and request.dimensions is not None:
            words = faults.refuse_dimensions_words.format(model=request.model, n=request.dimensions)
            raise RefusedError(faults.refuse_dimensions_status, words)
        native = faults.native_dimensions
        if request.dimensions is None or faults.ignore_dimensions:
            return native
        if not MIN_DIMENSIONS <= request.dimensions <= native:
            raise RefusedError(400, f"dimensions must be between {MIN_DIMENSIONS} and {native}")
        return request.dimensions


def _answer_strangely(faults: Faults) -> Answer | None:
    """What a server answers that makes no embeddings at this path."""
    if faults.redirect is not None:
        return Answer(301, b"", {"location": faults.redirect})
    return None if faults.page is None else Answer(200, faults.page.encode())


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def _names(text: str, words: list[str]) -> bool:
    return any(word in text for word in words)


def _check_texts(texts: list[str], n_tokens: int, faults: Faults) -> Answer | None:
    """What is answered instead of vectors, where that is no plain refusal."""
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise RefusedError(400, f"input must hold 1 to {MAX_TEXTS} texts, not {len(texts)}")
    if faults.max_texts and len(texts) > faults.max_texts:
        words = faults.max_texts_words.format(n=len(texts), most=faults.max_texts)
        raise RefusedError(faults.max_texts_status, words)
    if not all(texts):
        raise RefusedError(400, "input must not hold an empty text")
    if n_tokens > faults.max_request_tokens:
        words = faults.max_request_tokens_words.format(n=n_tokens, most=f"{faults.max_request_tokens:.0f}")
        raise RefusedError(faults.max_request_tokens_status, words)
    if faults.blank_status and not all(map(_is_visible, texts)):
        raise RefusedError(faults.blank_status, "Input validation error: `inputs` cannot be empty")
    if any(_names(text, faults.fail) for text in texts):
        if not faults.fail_status:
            return Answer(0, b"", delivery="reset")
        raise RefusedError(faults.fail_status, "input is too large to process")
    if any(_names(text, faults.poison) for text in texts):
        refusal = "text refused by the content filter"
        if faults.poison_inside:
            return Answer(200, msgspec.json.encode({"error": {"code": 400, "message": refusal}}))
        raise RefusedError(400, refusal)
    return None


def _compute_items(
    digests: list[bytes], without: list[bool], dimensions: int, as_base64: bool, plan: FaultPlan
) -> list[bytes]:
    """The JSON items of `data`, one of them spoilt where the faults say so."""
    faults = plan.faults
    spoil = faults.corrupt if faults.corrupt and plan.happens(faults.corrupt_share) else None
    victim = plan.random.randrange(len(digests)) if spoil else 0
    vectors = [_turn(vector_of_digest(digest, dimensions, faults.clusters), faults.turn) for digest in digests]
    if spoil == "wrong_size":
        vectors[victim] = vectors[victim][:-1]
    elif spoil == "nan":
        vectors[victim][0] = np.nan
    elif spoil == "zero":
        vectors[victim][:] = 0
    for vector, is_nan in zip(vectors, without, strict=True):
        if is_nan:
            vector[0] = np.nan
    if as_base64 and not faults.ignore_base64:
        encoded = [_encode_base64(vector, faults.base64_of) for vector in vectors]
    else:
        encoded = [_encode_floats(vector) for vector in vectors]
    if spoil == "bad_base64":
        encoded[victim] = b'"*not base64*"'
    elif spoil == "not_json":
        encoded[victim] = b"<html>"
    indexes = list(range(len(encoded)))
    if spoil == "duplicate_index":
        indexes[victim] = indexes[victim - 1]
    named = {"all": 0, "not first": 1, "none": len(indexes)}[faults.index]
    items = [
        b'{"object":"embedding",%b"embedding":%b}' % (b'"index":%d,' % index if index >= named else b"", vector)
        for index, vector in zip(indexes, encoded, strict=True)
    ]
    if spoil == "drop_item":
        del items[victim]
    if faults.reorder:
        plan.random.shuffle(items)
    return items


def _turn(vector: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    return np.sqrt(1 - np.float32(share) ** 2) * vector + np.float32(share) * np.roll(vector, 1) if share else vector


def _encode_base64(vector: NDArray[np.float32], number_type: str) -> bytes:
    if number_type == "float64 of all bits":
        numbers: NDArray[Any] = vector.astype("<f8")
        numbers.view("<u4")[::2] |= 0x7FC00000
    else:
        numbers = (vector * 127 if number_type == "int8" else vector).astype(number_type, copy=False)
    return b'"%b"' % pybase64.b64encode(numbers.data)


def _encode_floats(vector: NDArray[np.float32]) -> bytes:
    """JSON numbers; a NaN becomes `null`, as JSON has none."""
    return msgspec.json.encode(vector.tolist())
