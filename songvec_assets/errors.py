"""Every error the package raises on purpose. Nothing else belongs here.

A message says what was expected, what came and what to do. A class says whether a rerun helps.
"""


class SongvecError(Exception):
    """Something expected did not hold."""


class SettingsError(SongvecError):
    """A setting is missing or does not parse. A rerun helps only after it is corrected."""


class DatabaseError(SongvecError):
    """The database refused or could not be reached. The message says which, and what to do."""


class SourceError(SongvecError):
    """The songs table, or a column of it, is not what the settings name. A rerun alone does not help."""


class BulkDeletionError(SourceError):
    """So many songs are missing in the source that it is hardly meant. Nothing was touched; one run can confirm it."""


class StoreError(SongvecError):
    """The storage folder belongs to another database, or is cut otherwise. A rerun alone does not help."""


class ReembeddingError(SongvecError):
    """A changed setting would embed cached texts again. Nothing was sent; set it back, or confirm it for one run."""


class DamagedShardError(SongvecError):
    """A cache file is not as it was written. Its range is not loaded; fill it again, then load."""


class TableMismatchError(SongvecError):
    """The table holds another model, size or type. Refused before any request is paid for."""


class ProviderError(SongvecError):
    """The provider's answer ends the run: key, model, billing, or a protocol it does not speak."""


class VectorSizeError(ProviderError):
    """The model, or the server that answers for it, makes vectors of another size than the settings name."""


class ProviderUnavailableError(ProviderError):
    """The provider did not answer well within the configured patience. A later rerun helps."""


class ServerSickError(ProviderUnavailableError):
    """More texts fail, each alone, than songs can be at fault for. None of them is rejected; a later rerun may help."""


class RequestRefusedError(ProviderError):
    """The provider refused this very request (400 or 422): one of its texts, most likely."""


class RequestTooLargeError(RequestRefusedError):
    """The provider refused this very request for its size (413). Smaller ones may pass."""


class RequestTooSlowError(RequestTooLargeError):
    """The provider did not answer this request in time though it had nothing else to do. Smaller ones may pass."""


class RequestFailsError(RequestRefusedError):
    """This request fails alike again and again while others succeed: one of its texts, most likely."""


class BudgetExceededError(SongvecError):
    """The next request would exceed the budget. What was paid for is kept; raise the budget to go on."""


class AlertError(SongvecError):
    """Nobody could be told of a failed run. The run itself is not touched."""


class StoppedError(SongvecError):
    """The run was interrupted. What was paid for is kept; the same command goes on."""
