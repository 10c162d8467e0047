"""As in a notebook, in which an event loop is running already: estimate, run, look at the ranges, compare two songs."""

import asyncio

import polars as pl

from songvec_assets import Pipeline


async def cells() -> None:
    """What would be the cells of a notebook."""
    with Pipeline.from_env() as songs:
        print(f"about ${songs.estimate().usd:.2f}")
        songs.run()
        print(songs.status().ranges.select("key", "n_songs", "n_loaded", "n_missing"))

        names = pl.DataFrame(songs.search("winter and snow", limit=2))["name"]
        first, second = songs.embeddings([1, 2])["embedding"].to_numpy()
        similarity = first @ second / ((first @ first) * (second @ second)) ** 0.5
        print(f"nearest: {', '.join(names)}; songs 1 and 2 have similarity {similarity:.2f}")


asyncio.run(cells())
