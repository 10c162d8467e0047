"""Songs into pgvector with Baseten's performance client and psycopg 3's binary COPY, as written by hand.

One call per request and base64, decoded here: not what the client's page shows, which is all texts in one call and
floats, but the fastest way that was found (see `embedding_client`). Otherwise as `openai_copy`.
"""

import asyncio
import base64
import os

import numpy as np
import psycopg
from baseten_performance_client import PerformanceClient, RequestProcessingPreference
from pgvector import Vector
from pgvector.psycopg import register_vector_async

BATCH, IN_FLIGHT, MODEL, DIMENSIONS = 256, 8, "fireworks/qwen3-embedding-8b", 2000


async def main() -> None:
    url = os.environ["POSTGRES_URL"]
    client = PerformanceClient(os.environ["FIREWORKS_BASE_URL"].removesuffix("/v1"), os.environ["FIREWORKS_API_KEY"])
    # requests are cut at 8,000 characters by default; this is the most it takes
    preference = RequestProcessingPreference(
        batch_size=BATCH, max_concurrent_requests=IN_FLIGHT, max_chars_per_request=1_048_576
    )
    slots, writing = asyncio.Semaphore(IN_FLIGHT), asyncio.Lock()
    async with (
        await psycopg.AsyncConnection.connect(url) as reader,
        await psycopg.AsyncConnection.connect(url, autocommit=True) as writer,
    ):
        await writer.execute("CREATE EXTENSION IF NOT EXISTS vector")
        await writer.execute(
            f"CREATE TABLE song_embeddings (song_id integer PRIMARY KEY, embedding vector({DIMENSIONS}))"
        )
        await register_vector_async(writer)

        async def store(songs: list[tuple[int, str, str, str]]) -> None:
            try:
                texts = [f"{name} by {artist}\n{lyrics}" for _, name, artist, lyrics in songs]
                response = await client.async_embed(texts, MODEL, "base64", DIMENSIONS, preference=preference)
            finally:
                slots.release()
            statement = "COPY song_embeddings (song_id, embedding) FROM STDIN WITH (FORMAT BINARY)"
            async with writing, writer.cursor() as cursor, cursor.copy(statement) as copy:
                copy.set_types(["int4", "vector"])
                for (song_id, *_), item in zip(songs, response.data, strict=True):
                    embedding = np.frombuffer(base64.b64decode(item.embedding), dtype="<f4")
                    await copy.write_row([song_id, Vector(embedding)])

        async with asyncio.TaskGroup() as group, reader.cursor("songs") as cursor:
            await cursor.execute("SELECT id, name, artist, lyrics FROM songs ORDER BY id")
            while songs := await cursor.fetchmany(BATCH):
                await slots.acquire()
                group.create_task(store(songs))


asyncio.run(main())
