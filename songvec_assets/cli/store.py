"""The commands about a whole store: move-store, adopt, forget.

When to add here: another command that changes the place, the owner or the content of a store without a run. Keep out:
how (`cache.move`, `cache.store`, `cache.erasure`).
"""

from typing import Annotated

import typer

from songvec_assets.cli import base
from songvec_assets.cli.base import app
from songvec_assets.cli.terminal import hint, interruptible, say, showing_progress, warn


@app.command("move-store")
def move_store(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Folder or URL of the store.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="Where it goes: a folder, s3://…, gs://…, az://….")],
) -> None:
    """Move the store to another folder or bucket, checked by its checksums; pays nothing, resumes if interrupted."""
    from songvec_assets.cache import move
    from songvec_assets.progress import RunContext
    from songvec_assets.storage import open_storage

    pipeline = base.make_pipeline()
    origin = open_storage(source)
    destination = open_storage(target)
    with interruptible(), showing_progress() as show:
        run = RunContext(show, pipeline.stop)
        moved = move.move_store(origin, destination, pipeline.tiling, pipeline.database, run)
    for line in moved.damaged:
        warn(f"{line}: it was damaged before, and the next run embeds what it lacks")
    say(
        f"{moved.n_objects:,} objects, {moved.n_bytes / 1e6:,.1f} MB, are in {destination.location}; "
        f"{moved.n_copied:,} were copied now. Set SONGVEC_STORAGE={target}"
    )
    hint(f"what is left in {source} is no store any more: remove it once the next run has passed.")


@app.command()
def adopt() -> None:
    """Bind the storage folder to the database, after one of them was moved, copied or restored."""
    from songvec_assets.cache.store import adopt_store, open_store
    from songvec_assets.postgres.schema import ensure_schema

    pipeline = base.make_pipeline()
    ensure_schema(pipeline.database)
    store = open_store(pipeline.storage, pipeline.tiling)
    adopt_store(store, pipeline.database)
    say(f"{store.storage} now belongs to {pipeline.database.describe()}")
    hint("`songvec estimate` shows what a run would cost.")


@app.command()
def forget(
    song_ids: Annotated[
        list[int], typer.Argument(metavar="SONG_ID…", min=0, help="Of songs that are deleted already.")
    ],
) -> None:
    """Erase deleted songs from the cache now, and not after SONGVEC_RETENTION_DAYS."""
    n_erased = base.make_pipeline().forget(song_ids)
    say(f"vectors erased from the cache: {n_erased:,}")
    hint("`songvec swap --drop-old` drops a table that a swap kept; backups and Dagster's charts may name them, too.")
