"""Songs into pgvector with AsyncOpenAI and psycopg 3's binary COPY, as written by hand. No index, no checks.

Eight requests in flight, which one connection's COPY follows, a transaction per batch: what was paid for survives a
crash. AsyncOpenAI as in its README; COPY as in pgvector-python's examples/loading/example.py (read 2026-11).
"""

import asyncio
import os

import psycopg
from openai import AsyncOpenAI
from pgvector import Vector
from pgvector.psycopg import register_vector_async

BATCH, IN_FLIGHT, MODEL, DIMENSIONS = 256, 8, "fireworks/qwen3-embedding-8b", 2000


async def main() -> None:
    url = os.environ["POSTGRES_URL"]
    client = AsyncOpenAI(
        base_url=os.environ["FIREWORKS_BASE_URL"], api_key=os.environ["FIREWORKS_API_KEY"], max_retries=5
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
                response = await client.embeddings.create(model=MODEL, input=texts, dimensions=DIMENSIONS)
            finally:
                slots.release()
            statement = "COPY song_embeddings (song_id, embedding) FROM STDIN WITH (FORMAT BINARY)"
            async with writing, writer.cursor() as cursor, cursor.copy(statement) as copy:
                copy.set_types(["int4", "vector"])
                for (song_id, *_), item in zip(songs, response.data, strict=True):
                    await copy.write_row([song_id, Vector(item.embedding)])

        async with asyncio.TaskGroup() as group, reader.cursor("songs") as cursor:
            await cursor.execute("SELECT id, name, artist, lyrics FROM songs ORDER BY id")
            while songs := await cursor.fetchmany(BATCH):
                await slots.acquire()
                group.create_task(store(songs))


asyncio.run(main())
