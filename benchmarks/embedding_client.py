"""Embeddings per second that a whole client gets from one local provider: this client, its peers, and a bare reader.

All get the same texts (1,600 characters, about 400 tokens) in requests of the same size, the same number in flight if
their API allows it, and a fresh process each; rounds are interleaved. The provider is the tests' own: one process on
loopback, no latency, 2,000 dimensions. Peers are called as documented and end with what their API gives: lists of
floats for openai and LangChain (which sends one request after another), a float32 matrix for the others. Answers are
discarded, but a client that takes all texts in one call holds all of them, as its peak memory shows. The first and last
vector of each call are compared with what the provider computed.

Baseten's client is called three ways: as its documentation does, with all texts in one call, when it requests floats;
the same with its option for base64, which its `numpy()` refuses, so that the caller decodes; and with one call per
request, which is not in its documentation, and is the fastest way that was found.

The drain rows are the ceiling: one request built beforehand, on as many connections, and answers that are only read.
If the provider keeps a whole core busy, or a client comes near its drain, the provider was measured instead.
This client reserves its quota at the RateLimiter in an embedded Postgres, as in production. At the end it sends its
texts once more, and four times as many: its peak memory must not grow.

To repeat it, on Linux, from the project's folder: `pip install -c constraints.txt -e '.[bench]'`, then
`python -m benchmarks.embedding_client`. `--markdown` and `--json` are for documents.
"""

import argparse
import asyncio
import base64
import getpass
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from http.client import HTTPConnection
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil

from songvec_assets_tests.provider import Provider, running_provider, vector_of

MODEL, DIMENSIONS = "fireworks/qwen3-embedding-8b", 2000
LYRICS = "\n".join(f'Verse {line:02d} says "hold on" to the passing night' for line in range(40))[:1590]

Embed = Callable[[list[str]], Awaitable[Any]]


class Load(NamedTuple):
    """What one client is to send, and where to."""

    client: str
    n_texts: int
    request_texts: int
    concurrency: int
    provider: Provider
    database_url: str

    @property
    def server(self) -> dict[str, Any]:
        """The provider's URL and key, as clients get them."""
        return {"base_url": self.provider.base_url, "api_key": self.provider.api_key}


class Measure(NamedTuple):
    """One run of one client. CPU seconds are those of all threads, user and system, while it sends."""

    client: str
    n_texts: int
    seconds: float
    client_cpu_s: float
    provider_cpu_s: float
    peak_rss_mb: float
    max_in_flight: int


@asynccontextmanager
async def connect_this(load: Load) -> AsyncIterator[Embed]:
    """This client, with its limiter."""
    from songvec_assets.embedding.client import EmbeddingClient
    from songvec_assets.embedding.embedder import Endpoint
    from songvec_assets.embedding.limits import RateLimiter
    from songvec_assets.postgres.engine import get_engine

    limiter = RateLimiter(get_engine(load.database_url, "web"), load.provider.base_url, 1e9, 1e12)
    client = EmbeddingClient(Endpoint(load.provider.base_url, load.provider.api_key, MODEL, DIMENSIONS), limiter)

    async def embed(texts: list[str]) -> Any:
        return (await client.generate_embeddings_batch(texts)).embeddings

    yield embed
    await client.close()


@asynccontextmanager
async def connect_openai(load: Load, **asked: Any) -> AsyncIterator[Embed]:
    """AsyncOpenAI; if no format is given, it requests base64 itself."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(**load.server)

    async def embed(texts: list[str]) -> Any:
        response = await client.embeddings.create(model=MODEL, input=texts, dimensions=DIMENSIONS, **asked)
        return [item.embedding for item in response.data]

    yield embed
    await client.close()


@asynccontextmanager
async def connect_langchain(load: Load) -> AsyncIterator[Embed]:
    """LangChain, as its reference says for other servers than OpenAI's."""
    from langchain_openai import OpenAIEmbeddings

    size: dict[str, Any] = {"dimensions": DIMENSIONS, "chunk_size": load.request_texts}
    yield OpenAIEmbeddings(**load.server, model=MODEL, check_embedding_ctx_length=False, **size).aembed_documents


@asynccontextmanager
async def connect_baseten(load: Load, encoding_format: str | None = None) -> AsyncIterator[Embed]:
    """Baseten's Rust client. Its `numpy()` refuses base64, which is not documented: there the caller decodes."""
    from baseten_performance_client import PerformanceClient, RequestProcessingPreference

    client = PerformanceClient(load.provider.base_url.removesuffix("/v1"), load.provider.api_key)
    # requests are cut at 8,000 characters by default; this is the most it takes
    limits: dict[str, Any] = {"max_concurrent_requests": load.concurrency, "max_chars_per_request": 1_048_576}
    preference = RequestProcessingPreference(batch_size=load.request_texts, **limits)

    async def embed(texts: list[str]) -> Any:
        response = await client.async_embed(texts, MODEL, encoding_format, DIMENSIONS, preference=preference)
        if encoding_format != "base64":
            return response.numpy()
        return np.stack([np.frombuffer(base64.b64decode(item.embedding), dtype="<f4") for item in response.data])

    yield embed


@asynccontextmanager
async def connect_drain(load: Load, encoding_format: str) -> AsyncIterator[Embed]:
    """No client: a request built beforehand is sent again and again, and each answer is read into the same buffer."""
    asked = {"model": MODEL, "dimensions": DIMENSIONS, "encoding_format": encoding_format}
    body = json.dumps({**asked, "input": make_texts(range(load.request_texts))}).encode()
    headers = {"authorization": f"Bearer {load.provider.api_key}"}
    idle = [HTTPConnection(urlsplit(load.provider.base_url).netloc) for _ in range(load.concurrency)]
    threads = ThreadPoolExecutor(load.concurrency)
    buffer = bytearray(2**20)

    def exchange() -> Any:
        connection = idle.pop()
        connection.request("POST", "/v1/embeddings", body, headers)
        with connection.getresponse() as response:
            while response.readinto(buffer):
                pass
        idle.append(connection)
        return ()

    yield lambda _: asyncio.get_running_loop().run_in_executor(threads, exchange)


class Contestant(NamedTuple):
    """A client as it is called: it gets the texts of one request per call, or all of them if it `cuts_requests`."""

    connect: Callable[[Load], AbstractAsyncContextManager[Embed]]
    n_texts: int
    drain: str = "drain"
    cuts_requests: bool = False
    refuse_base64: bool = False


_FLOATS = "drain, floats"
CONTESTANTS = {
    "this": Contestant(connect_this, 50_000),
    "this, floats": Contestant(connect_this, 10_000, _FLOATS, refuse_base64=True),
    "AsyncOpenAI": Contestant(connect_openai, 10_000),
    "AsyncOpenAI, floats": Contestant(partial(connect_openai, encoding_format="float"), 1_500, _FLOATS),
    "LangChain": Contestant(connect_langchain, 8_000, cuts_requests=True),
    "Baseten": Contestant(connect_baseten, 15_000, _FLOATS, cuts_requests=True),
    "Baseten, base64": Contestant(partial(connect_baseten, encoding_format="base64"), 30_000, cuts_requests=True),
    "Baseten, base64, cut by hand": Contestant(partial(connect_baseten, encoding_format="base64"), 50_000),
    "drain": Contestant(partial(connect_drain, encoding_format="base64"), 80_000),
    _FLOATS: Contestant(partial(connect_drain, encoding_format="float"), 15_000, _FLOATS),
}
RATIOS = {
    ("this", "AsyncOpenAI"): " (to reach: >= 5)",
    ("this", "Baseten"): "",
    ("this", "Baseten, base64"): " (to reach: >= 1.5)",
    ("this", "Baseten, base64, cut by hand"): "",
    ("this, floats", "AsyncOpenAI, floats"): " (to reach: >= 15)",
}


def make_texts(numbers: Iterable[int]) -> list[str]:
    """Distinct texts of 1,600 characters."""
    return [f"{number:09d}\n{LYRICS}" for number in numbers]


async def send(load: Load, embed: Embed) -> Measure:
    """Send the load and measure it, without the imports, the connections and a first small request on each."""
    slots = asyncio.Semaphore(load.concurrency)

    async def call(numbers: range) -> None:
        async with slots:
            texts = make_texts(numbers)
            vectors = await embed(texts)
            for row in (0, -1) if len(vectors) else ():
                if np.abs(np.asarray(vectors[row], dtype=np.float32) - vector_of(texts[row], DIMENSIONS)).max() > 1e-6:
                    raise RuntimeError(f"{load.client} gave a wrong vector for text {numbers[row]}")

    async def call_all(n_texts: int, step: int) -> None:
        await asyncio.gather(*(call(range(start, start + step)) for start in range(0, n_texts, step)))

    def read_clocks() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), sum(psutil.Process(load.provider.pid).cpu_times()[:2])

    await call_all(8 * load.concurrency, 8)
    load.provider.reset_ledger()
    before = read_clocks()
    await call_all(load.n_texts, load.n_texts if CONTESTANTS[load.client].cuts_requests else load.request_texts)
    seconds, cpu_s, provider_cpu_s = (end - start for start, end in zip(before, read_clocks(), strict=True))
    ledger = load.provider.ledger()
    if ledger["requests"] * load.request_texts != load.n_texts:
        raise RuntimeError(f"{load.client} sent {load.n_texts} texts in {ledger['requests']} requests")
    # getrusage's peak would include what the parent held before exec
    peak_kib = int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    peak_mb = peak_kib * 1024 / 1e6
    return Measure(load.client, load.n_texts, seconds, cpu_s, provider_cpu_s, peak_mb, ledger["max_in_flight"])


def measure(load: Load) -> Measure:
    """Connect a client and send; in its own process, if its memory is to be measured."""

    async def connect_and_send() -> Measure:
        async with CONTESTANTS[load.client].connect(load) as embed:
            return await send(load, embed)

    load.provider.control(keep_texts=False, refuse_base64=CONTESTANTS[load.client].refuse_base64)
    return asyncio.run(connect_and_send())


def compare_clients(measures: dict[str, list[Measure]]) -> list[list[str]]:
    """Medians over the rounds, and the spread of the rates."""
    rates = {name: [run.n_texts / run.seconds for run in runs] for name, runs in measures.items()}
    return [
        [
            name,
            f"{median(rates[name]):,.0f}",
            f"{min(rates[name]):,.0f}–{max(rates[name]):,.0f}",
            f"{median(rates[name]) / median(rates[drain]):.0%}" if (drain := CONTESTANTS[name].drain) in rates else "",
            f"{median(run.client_cpu_s / run.n_texts for run in runs) * 1000:.3f}",
            f"{median(run.provider_cpu_s / run.seconds for run in runs):.2f}",
            f"{max(run.max_in_flight for run in runs)}",
            f"{median(run.peak_rss_mb for run in runs):,.0f}",
        ]
        for name, runs in measures.items()
    ]


def compare_pairs(measures: dict[str, list[Measure]]) -> list[list[str]]:
    """How many times as fast, within each round: medians and spread; and by CPU seconds alone."""
    rows = []
    for (ours, theirs), target in RATIOS.items():
        if ours in measures and theirs in measures:
            pairs = list(zip(measures[ours], measures[theirs], strict=True))
            rates = [our.n_texts / our.seconds * their.seconds / their.n_texts for our, their in pairs]
            cpus = [our.n_texts / our.client_cpu_s * their.client_cpu_s / their.n_texts for our, their in pairs]
            spread = f"{min(rates):.1f}–{max(rates):.1f}"
            rows.append([f"{ours} / {theirs}", f"{median(rates):.1f}{target}", spread, f"{median(cpus):.1f}"])
    return rows


def print_table(columns: str, rows: list[list[str]], markdown: bool) -> None:
    """Cells padded to the widest of their column."""
    if not rows:
        return
    table = [columns.split(" | "), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    if markdown:
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    print("\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line) for line in lines), end="\n\n")


def main() -> None:
    """Measure what the command line asks for, and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedding_client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--request-texts", type=int, default=512, help="at most 655: Baseten's limit of characters")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once")
    parser.add_argument("--clients", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="CLIENT")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args()
    from songvec_assets.postgres.embedded import start_embedded_server
    from songvec_assets.postgres.schema import ensure_schema

    # a short path: the server's socket lies in its folder, and socket paths end at 107 characters
    folder = tempfile.TemporaryDirectory(prefix=f"songvec-{getpass.getuser()}-", ignore_cleanup_errors=True)
    with folder, running_provider() as provider:
        database = start_embedded_server(Path(folder.name) / "pg")
        ensure_schema(database)

        def measure_client(name: str, times: int = 1) -> Measure:
            n_texts = -(-CONTESTANTS[name].n_texts // asked.request_texts) * asked.request_texts * times
            load = Load(name, n_texts, asked.request_texts, asked.concurrency, provider, database.url)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(measure, load).result()

        rounds = [{name: measure_client(name) for name in asked.clients} for _ in range(asked.rounds)]
        memory = [measure_client("this", times) for times in (1, 4) if "this" in asked.clients]
    measures = {name: [each[name] for each in rounds] for name in asked.clients}
    if asked.json:
        print(json.dumps([run._asdict() for runs in (*measures.values(), memory) for run in runs], indent=1))
        return
    columns = "client | embeddings/s | min–max | of its drain | client CPU s/1000 | provider cores | at once | peak MB"
    print_table(columns, compare_clients(measures), asked.markdown)
    print_table("ratio | by rate | min–max | by client CPU", compare_pairs(measures), asked.markdown)
    sizes = [[f"{run.n_texts:,} texts", f"{run.peak_rss_mb:,.0f}"] for run in memory]
    print_table("this client's memory | peak MB", sizes, asked.markdown)


if __name__ == "__main__":
    main()
