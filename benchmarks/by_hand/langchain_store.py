"""Songs into pgvector with LangChain's PGVectorStore, as its page says. No index, no checks.

https://docs.langchain.com/oss/python/integrations/vectorstores/pgvectorstore (read 2026-11): an engine, a table made
by it, `aadd_documents`; eight calls at once, of one request each. `langchain-postgres` needs another pgvector than
this project: it runs in an environment of its own.
"""

import asyncio
import os

import psycopg
from langchain_core.documents import Document
from langchain_openai import OpenAIEmbeddings
from langchain_postgres import Column, PGEngine, PGVectorStore

BATCH, IN_FLIGHT, MODEL, DIMENSIONS = 256, 8, "fireworks/qwen3-embedding-8b", 2000


async def main() -> None:
    url = os.environ["POSTGRES_URL"]
    embeddings = OpenAIEmbeddings(
        base_url=os.environ["FIREWORKS_BASE_URL"],
        api_key=os.environ["FIREWORKS_API_KEY"],
        model=MODEL,
        dimensions=DIMENSIONS,
        chunk_size=BATCH,
        check_embedding_ctx_length=False,  # as its reference says for other servers than OpenAI's
    )
    engine = PGEngine.from_connection_string(url=url.replace("postgresql://", "postgresql+asyncpg://", 1))
    await engine.ainit_vectorstore_table("song_embeddings", DIMENSIONS, id_column=Column("song_id", "INTEGER"))
    store = await PGVectorStore.create(
        engine=engine, table_name="song_embeddings", embedding_service=embeddings, id_column="song_id"
    )
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def add(songs: list[tuple[int, str, str, str]]) -> None:
        try:
            documents = [Document(page_content=f"{name} by {artist}\n{lyrics}") for _, name, artist, lyrics in songs]
            await store.aadd_documents(documents, ids=[song_id for song_id, *_ in songs])
        finally:
            slots.release()

    async with (
        await psycopg.AsyncConnection.connect(url) as reader,
        asyncio.TaskGroup() as group,
        reader.cursor("songs") as cursor,
    ):
        await cursor.execute("SELECT id, name, artist, lyrics FROM songs ORDER BY id")
        while songs := await cursor.fetchmany(BATCH):
            await slots.acquire()
            group.create_task(add(songs))
    await engine.close()


asyncio.run(main())
