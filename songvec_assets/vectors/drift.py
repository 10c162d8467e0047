"""How the table's vectors lie, as of each load that changed it and was looked at, and how far they moved since.

A provider that changes its model under its old name changes no count and no size: it shows here. Distances are in units
of the mean vector length.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from songvec_assets.postgres.engine import Database
from songvec_assets.postgres.schema import read_fact, write_fact
from songvec_assets.vectors.audit import audit_vectors
from songvec_assets.vectors.ledger import digest_ledger, read_ledger
from songvec_assets.vectors.table import TableSpec

_PROFILES = "profiles"
"""Of two loads, whichever tables they went to: a change of all rows is a table of its own."""
_NORM_BY = 0.02
_NOISE_TIMES = 3.0


@dataclass(frozen=True)
class Profile:
    """A sample of the table.

    Attributes:
        version: of what is loaded.
        spec: what it holds, in words.
        n_sampled: rows.
        mean_norm: their mean length.
        mean: their mean vector.
    """

    version: str
    spec: str
    n_sampled: int
    mean_norm: float
    mean: list[float]


@dataclass(frozen=True)
class Drift:
    """Two loads, held against each other.

    Attributes:
        norm: change of the mean length, as a share.
        distance: between the mean vectors, in mean lengths.
        allowed: distance that two samples of the same vectors hardly reach.
    """

    norm: float
    distance: float
    allowed: float

    @property
    def is_large(self) -> bool:
        """Whether the vectors are no longer those they were."""
        return abs(self.norm) > _NORM_BY or self.distance > self.allowed

    def describe(self) -> str:
        """One sentence."""
        told = (
            f"since the load before, the mean length changed by {self.norm:+.1%} and the mean vector moved by "
            f"{self.distance:.3f} lengths (up to {self.allowed:.3f} is chance)"
        )
        return f"{told}: has the provider changed the model under its name?" if self.is_large else told


def measure_drift(database: Database, spec: TableSpec) -> Drift | None:
    """How far the last load moved the vectors; None where no load before it, of the same kind, was looked at.

    Takes a sample of the serving table where it changed since the last look, and keeps it for the next.
    """
    version = digest_ledger(read_ledger(database), spec)
    with database.get_connection() as connection:
        kept: Any = read_fact(connection, _PROFILES) or []
    profiles = [Profile(**each) for each in kept if each.keys() == Profile.__dataclass_fields__.keys()]
    if not profiles or profiles[-1].version != version:
        audit = audit_vectors(database, spec)
        if not audit.n_sampled or audit.bad_song_ids:
            return None
        now = Profile(version, str(spec), audit.n_sampled, audit.mean_norm, np.round(audit.mean, 6).tolist())
        profiles = [*profiles[-1:], now]
        with database.get_connection() as connection:
            write_fact(connection, _PROFILES, [asdict(each) for each in profiles])
    if len(profiles) < 2 or profiles[0].spec != profiles[1].spec:
        return None
    before, now = profiles
    distance = float(np.linalg.norm(np.subtract(now.mean, before.mean))) / before.mean_norm
    allowed = _NOISE_TIMES * math.sqrt(1 / before.n_sampled + 1 / now.n_sampled)
    return Drift(now.mean_norm / before.mean_norm - 1, distance, allowed)
