"""The tree of the errors that the package raises on purpose.

    SongvecError
    ├── SettingsError            a setting is missing or does not parse
    ├── DatabaseError            the database refused, or could not be reached
    ├── SourceError              the songs table is not what the settings name
    │   └── BulkDeletionError    more songs are missing than is plausible
    ├── StoreError               the storage folder is another database's, or cannot be used
    │   └── UnwritableError      its disk is full, or refuses a file
    ├── StorageError             the object store refused, or could not be reached
    ├── ReembeddingError         a changed setting would embed cached texts again
    ├── DamagedCacheError        a file of the cache is damaged or missing
    ├── TableMismatchError       the table holds another model, size or type
    ├── SearchError              a search asks for something that it cannot get
    ├── ServeError               the HTTP server cannot start, or refuses a request
    ├── ProviderError            the provider's answer ends the run
    │   ├── VectorSizeError      vectors of another size than the settings name
    │   ├── ModelChangedError    the server's vectors are not those stored
    │   ├── ProviderUnavailableError    no good answer within the patience
    │   │   └── ServerFailingError  more texts fail than songs can be at fault for
    │   └── RequestRefusedError  this one request is refused
    │       ├── RequestTooLargeError    for its size
    │       │   └── RequestTooSlowError    it takes too long
    │       └── RequestFailsError    it fails each time while others succeed
    ├── BudgetExceededError      the next request would exceed a budget
    ├── AlertError               the webhook could not be notified
    └── StoppedError             the run was interrupted

Two stand with what they report: `IncompleteExportError`, a DatabaseError, in `songs/reports`; and
`MalformedResponseError`, a ProviderUnavailableError, in `embedding/wire`.
A message says what was expected, what came and what to do. A `code` identifies the cause for scripts and for the list
in docs/operations.md: that of the class, or a given one if a class has causes with different remedies.
When to add here: an error that callers handle differently from all others. Keep out: messages, which are written where
the error is raised.
"""


class SongvecError(Exception):
    """The base of all errors of this package.

    Args:
        message: what was expected, what came, what to do.
        code: a stable name of the cause; None: that of the class.
    """

    code: str

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.code


class SettingsError(SongvecError):
    """A setting is missing or does not parse. A rerun helps only after it is corrected."""

    code = "settings.invalid"


class DatabaseError(SongvecError):
    """The database refused or could not be reached. The message says what to do."""

    code = "database.failed"


class SourceError(SongvecError):
    """The songs table, or a column of it, is not what the settings name. A rerun alone does not help."""

    code = "source.mismatch"


class BulkDeletionError(SourceError):
    """More songs are missing in the source than is plausible. Nothing was changed; one run can confirm it."""

    code = "source.bulk-deletion"


class StoreError(SongvecError):
    """The storage folder belongs to another database, or cannot be used. A rerun alone does not help."""

    code = "store.mismatch"


class UnwritableError(StoreError):
    """The disk of the storage folder is full, or refuses a file, as it would for every range."""

    code = "store.not-writable"


class StorageError(SongvecError):
    """The object store refused or could not be reached, as it would for every range. The message says what to do."""

    code = "storage.failed"


class ReembeddingError(SongvecError):
    """A changed setting would embed cached texts again. Nothing was sent; undo or confirm it."""

    code = "cache.reembedding"


class DamagedCacheError(SongvecError):
    """A file of the cache is damaged or missing. Its range is not loaded; fill it again, then load."""

    code = "cache.damaged"


class TableMismatchError(SongvecError):
    """The table holds another model, size or type. Refused before any request is paid for."""

    code = "table.mismatch"


class SearchError(SongvecError):
    """A search asks for something that it cannot get. Nothing was found; correct the query."""

    code = "search.invalid"


class ServeError(SongvecError):
    """The HTTP server cannot start, or refuses a request before it searches."""

    code = "serve.request"


class ProviderError(SongvecError):
    """The provider's answer ends the run: key, model, billing, or an unknown protocol."""

    code = "provider.failed"


class VectorSizeError(ProviderError):
    """The model, or the server that serves it, makes vectors of another size than the settings name."""

    code = "provider.vector-size"


class ModelChangedError(ProviderError):
    """The provider gives other vectors than those stored of the model. No song was paid for; restore or confirm it."""

    code = "provider.model-changed"


class ProviderUnavailableError(ProviderError):
    """The provider gave no good answer within the configured patience. A later rerun helps."""

    code = "provider.unavailable"


class ServerFailingError(ProviderUnavailableError):
    """More texts fail, each sent alone, than texts can be at fault for. None is rejected; a later rerun may help."""

    code = "provider.failing"


class RequestRefusedError(ProviderError):
    """The provider refused this one request (400 or 422): most likely because of one of its texts."""

    code = "provider.request-refused"


class RequestTooLargeError(RequestRefusedError):
    """The provider refused this one request for its size (413). Smaller ones may pass."""


class RequestTooSlowError(RequestTooLargeError):
    """The provider did not answer this request in time, although no other was in flight. Smaller ones may pass."""


class RequestFailsError(RequestRefusedError):
    """This request fails in the same way each time while others succeed: most likely because of one of its texts."""


class BudgetExceededError(SongvecError):
    """The next request would exceed the budget. What was paid for is kept; raise the budget to go on."""

    code = "budget.exceeded"


class AlertError(SongvecError):
    """The webhook could not be notified of a failed run. The run itself is not affected."""

    code = "alert.failed"


class StoppedError(SongvecError):
    """The run was interrupted. What was paid for is kept; the same command goes on."""

    code = "run.interrupted"


def describe(error: BaseException | None) -> str:
    """An error's message for people; with its code, if it is one of these."""
    return f"{error} [{error.code}]" if isinstance(error, SongvecError) else str(error)
