"""How the texts of a model's cache are made: the recorded settings, and the refusal to re-embed because they changed.

The first fill writes `texts.json` to the model's folder; a fill with changed settings writes it again, once confirmed.
When to add here: another setting that changes every text. Keep out: the confirmation, and the fill of a range.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from songvec_assets.embedding.prompts import NO_PROMPTS, Prompts, default_prompts
from songvec_assets.errors import ReembeddingError, StoreError
from songvec_assets.settings import Settings
from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.storage import Storage

if TYPE_CHECKING:  # `songvec settings` reads the record, and needs neither frames nor a database
    from songvec_assets.cache.cached_range import RangeFiles
    from songvec_assets.embedding.pricing import Estimate
    from songvec_assets.songs.text import TextSpec

_KEY = "texts.json"


class TextRecord(msgspec.Struct, frozen=True):
    """The settings of the last fill: the fields of TextSpec, and the prompt for queries."""

    template: str
    max_chars: int
    document_prompt: str
    query_prompt: str

    @classmethod
    def of(cls, spec: "TextSpec", query_prompt: str) -> "TextRecord":
        """The record for these settings."""
        return cls(spec.template, spec.max_chars, spec.document_prompt, query_prompt)

    @property
    def spec(self) -> "TextSpec":
        """How songs became texts."""
        from songvec_assets.songs.text import TextSpec

        return TextSpec(self.template, self.max_chars, self.document_prompt)


def read_record(storage: Storage) -> TextRecord | None:
    """The record in the storage of a model; None: there is none, as in caches of earlier versions.

    Raises:
        StoreError: it does not parse.
    """
    read = storage.read(_KEY)
    try:
        return msgspec.json.decode(read.content, type=TextRecord) if read else None
    except msgspec.DecodeError as error:
        raise StoreError(
            f"{storage.describe(_KEY)} does not parse ({error}), so it is not known how the cached texts were "
            "made: restore it, or set SONGVEC_QUERY_PROMPT and SONGVEC_DOCUMENT_PROMPT to what they were, and "
            "remove it",
            "store.damaged",
        ) from error


def write_record(storage: Storage, record: TextRecord) -> None:
    """Write the record. Not for concurrent writers."""
    storage.put(_KEY, msgspec.json.encode(record))


def model_storage(root: Storage, model: str, dimensions: int) -> Storage:
    """Where the cache of a model is in a store."""
    return root.within("embeddings").within(f"{model.replace('/', '--')}-{dimensions}")


def choose_prompts(root: Storage, given: Settings) -> Prompts:
    """The prompts of the configured model: as set, else as recorded with its cache, else the defaults of its family.

    A cache without a record, of an earlier version, has no document prompt.

    Args:
        root: of the store.
    """
    storage = model_storage(root, given.model, given.dimensions)
    record = read_record(storage)
    default = default_prompts(given.model, given.embedding_model)
    if record is not None:
        default = Prompts(record.query_prompt, record.document_prompt)
    elif storage.scan().prefixes:
        default = Prompts(default.query, NO_PROMPTS.document)
    return Prompts(given.query_prompt or default.query, given.document_prompt or default.document)


def is_made_otherwise(storage: Storage, files: "RangeFiles", spec: "TextSpec") -> bool:
    """Whether a range's cached texts were made with other settings, as far as recorded."""
    if files.manifest is not None and files.manifest.complete is not None:
        return files.manifest.complete.text != spec.identity
    # the last fill is incomplete; if the manifest does not parse, the range's fill refuses it
    record = read_record(storage) if files.sizes and not files.error else None
    return record is not None and record.spec.identity != spec.identity


def check_reembedding(
    storage: Storage,
    changed: Sequence[SongIdRange],
    spec: "TextSpec",
    estimate: "Callable[[Sequence[SongIdRange]], Estimate]",
) -> None:
    """Refuse to re-embed cached songs only because a setting changed their texts.

    Args:
        storage: of the model.
        changed: ranges whose texts were made with other settings.
        spec: how songs become texts now.
        estimate: returns what filling these ranges would send; called only if there are any.

    Raises:
        ReembeddingError: has the number of texts and their price.
    """
    planned = estimate(changed) if changed else None
    if planned is not None and planned.n_again:
        changes = _name_changes(read_record(storage), spec)
        raise ReembeddingError(
            f"{planned.n_again:,} texts that are cached would be embedded again, for about ${planned.usd_again:,.4f}: "
            f"{changes}. Nothing was sent. Set it back, or confirm it for one run with "
            "`--confirm-reembedding`, or `confirm_reembedding` in the run config"
        )


def _name_changes(record: TextRecord | None, spec: "TextSpec") -> str:
    variables = {
        "template": "SONGVEC_TEXT_TEMPLATE",
        "max_chars": "SONGVEC_MAX_TEXT_CHARS",
        "document_prompt": "SONGVEC_DOCUMENT_PROMPT",
    }
    changes = [
        f"{variable} was {getattr(record, name)!r} and is {getattr(spec, name)!r}"
        for name, variable in variables.items()
        if record is not None and getattr(record, name) != getattr(spec, name)
    ]
    return ", ".join(changes) or f"{', '.join(variables.values())} have changed"
