"""Whether a server gives the vectors that are stored under a model id: what is recorded of it, and the limit.

A provider may change the model behind a name, and another server or name may be set for the same model id; the table
would then hold vectors that cannot be compared. Of each server and name the probe's vector is recorded, and every run
compares with it. If nothing is recorded, cached songs are compared first (`cache.comparison`).
When to add here: another comparison of vectors. Keep out: sending (`client`), and which songs are compared.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import ModelChangedError
from songvec_assets.postgres import schema
from songvec_assets.postgres.engine import Database

MIN_COSINE = 0.999
"""Minimum cosine of two vectors of a text: rounding and other hardware stay above it, another model far below."""

_CURES = (
    "Go back to the former server or model; or set SONGVEC_MODEL_ID to a new name, and `songvec swap`; or confirm the "
    "change for one run (`--confirm-model-change`, `confirm_model_change` in the run config): searches then compare "
    "vectors of both, until all songs are embedded again"
)


@dataclass
class ModelRecord:
    """The probe's vector that the database has recorded of a server and its name for a model.

    Attributes:
        database: all runs on it compare with the same vector.
        model, dimensions: model id and size of the stored vectors.
        name, url: the provider's name for the model, and its server.
        is_confirmed: whether the server's vectors are accepted: they become what later runs compare with.
    """

    database: Database
    model: str
    dimensions: int
    name: str
    url: str
    is_confirmed: bool = False
    _probe: Float32Matrix | None = field(default=None, init=False)

    def needs_comparison(self) -> bool:
        """Whether nothing is recorded: songs are to be compared, then `confirm` is to be called."""
        return not self.is_confirmed and self._recorded is None

    def check(self, probe: Float32Matrix) -> None:
        """Compare the probe's vector, (dimensions,), with the recorded one, if there is one.

        Raises:
            ModelChangedError: they differ, and that is not confirmed.
        """
        self._probe = probe
        if self.is_confirmed:
            self._write(probe)
        elif self._recorded is not None and (cosine := get_cosine(self._recorded, probe)) < MIN_COSINE:
            raise ModelChangedError(
                f"the provider gives other vectors under the name {self.name!r} than before: the cosine of the "
                f"probe's vector with the recorded one is {cosine:.4f}, expected {MIN_COSINE} or more. No song was "
                f"sent or paid for. {_CURES}"
            )

    def check_songs(self, cosines: Mapping[int, float]) -> None:
        """Check the cosines of cached vectors with those that the server gives for the same texts, by song_id.

        Raises:
            ModelChangedError: one is too low.
        """
        worst = min(cosines, key=lambda song_id: cosines[song_id], default=None)
        if worst is not None and cosines[worst] < MIN_COSINE:
            n_low = sum(cosine < MIN_COSINE for cosine in cosines.values())
            raise ModelChangedError(
                f"{self.url} gives other vectors for {self.name!r} than those that are cached as {self.model!r}: of "
                f"{len(cosines)} cached songs that it embedded again, {n_low} have a cosine under {MIN_COSINE}, the "
                f"worst is song {worst} with {cosines[worst]:.4f} (0: no vector). Nothing else was paid for. {_CURES}"
            )

    def confirm(self) -> None:
        """Accept the server's vectors: the probe's is recorded now, or once it comes."""
        self.is_confirmed = True
        if self._probe is not None:
            self._write(self._probe)

    @property
    def _key(self) -> str:
        return f"probe of {self.model}, {self.dimensions} values, by {self.name} at {self.url}"

    @cached_property
    def _recorded(self) -> Float32Matrix | None:
        """None: nothing is recorded that can be read."""
        with self.database.get_connection() as connection:
            content = schema.read_record(connection, self._key, bytes) or b""
        vector = np.frombuffer(content if len(content) == 4 * self.dimensions else b"", dtype="<f4")
        return vector if vector.any() and np.isfinite(vector).all() else None

    def _write(self, probe: Float32Matrix) -> None:
        encoded = base64.b64encode(probe.astype("<f4").tobytes()).decode()
        with self.database.get_connection() as connection:
            schema.write_value(connection, self._key, encoded)


def get_cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The cosine of two vectors, in double precision."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
