"""Songs in Postgres become an indexed pgvector table of embeddings, as a Dagster asset graph.

The public API: `Pipeline` runs every step and answers every question, without Dagster; `Settings` configures it. Names
are imported when they are first used, so `import songvec_assets` costs nothing. When to add here: a name that users of
the package need. Keep out: code.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from songvec_assets.errors import (
        BudgetExceededError,
        BulkDeletionError,
        DamagedCacheError,
        DatabaseError,
        ModelChangedError,
        ProviderError,
        ProviderUnavailableError,
        ReembeddingError,
        SearchError,
        SettingsError,
        SongvecError,
        SourceError,
        StoppedError,
        StoreError,
        TableMismatchError,
    )
    from songvec_assets.pipeline import Pipeline
    from songvec_assets.search.labels import LabelledQuery
    from songvec_assets.search.nearest import Hit
    from songvec_assets.settings import Settings
    from songvec_assets.songs.ranges import SongIdRange

    __version__: str

__all__ = [
    "BudgetExceededError",
    "BulkDeletionError",
    "DamagedCacheError",
    "DatabaseError",
    "Hit",
    "LabelledQuery",
    "ModelChangedError",
    "Pipeline",
    "ProviderError",
    "ProviderUnavailableError",
    "ReembeddingError",
    "SearchError",
    "Settings",
    "SettingsError",
    "SongIdRange",
    "SongvecError",
    "SourceError",
    "StoppedError",
    "StoreError",
    "TableMismatchError",
    "__version__",
]

_MODULES = {
    "Pipeline": "pipeline",
    "Hit": "search.nearest",
    "LabelledQuery": "search.labels",
    "Settings": "settings",
    "SongIdRange": "songs.ranges",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("songvec-assets")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
