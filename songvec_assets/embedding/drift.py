"""Whether a model's name still stands for the same model: the probe's vector is compared with that of an earlier run.

A provider may change the model behind a name; the table would then hold vectors that cannot be compared. The probe
shows this before any song is paid for.
When to add here: another comparison of the probe's vector. Keep out: sending the probe (`client`).
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import ModelChangedError
from songvec_assets.postgres import schema
from songvec_assets.postgres.engine import Database

MIN_COSINE = 0.999
"""Minimum cosine of the probe's vectors in two runs: rounding stays far above it, another model far below."""


@dataclass(frozen=True)
class ModelRecord:
    """The probe's vector that the database has recorded for one model and size.

    Attributes:
        database: all runs on it compare with the same vector.
        model, dimensions: of the vector.
        is_confirmed: whether a different vector is expected, and replaces the recorded one.
        on_trouble: called with a warning.
    """

    database: Database
    model: str
    dimensions: int
    is_confirmed: bool = False
    on_trouble: Callable[[str], None] = lambda _: None

    def check(self, vector: Float32Matrix) -> None:
        """Compare the probe's vector, (dimensions,), with the recorded one; record it if there is none to compare with.

        Raises:
            ModelChangedError: they differ, and that is not confirmed.
        """
        key = f"probe of {self.model}, {self.dimensions} values"
        encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        with self.database.get_connection() as connection:
            if schema.read_value(connection, key) is None:
                schema.write_first_value(connection, key, encoded)
                return
            recorded = schema.read_record(connection, key, bytes) or b""
            known = np.frombuffer(recorded if len(recorded) == 4 * len(vector) else b"", dtype="<f4").astype(np.float64)
            if not known.any() or not np.isfinite(known).all():
                # kept, it would let every later change pass
                schema.write_value(connection, key, encoded)
                self.on_trouble(
                    f"the recorded probe of {self.model!r} cannot be read: it was replaced by this run's. A change of "
                    "the model before this run would not have been noticed"
                )
                return
            cosine = float(known @ vector / np.linalg.norm(known) / np.linalg.norm(vector.astype(np.float64)))
            if cosine >= MIN_COSINE:
                return
            if not self.is_confirmed:
                raise ModelChangedError(
                    f"the provider gives other vectors under the name {self.model!r} than before: the cosine of the "
                    f"probe's vector with the recorded one is {cosine:.4f}, expected {MIN_COSINE} or more. No song was "
                    "sent or paid for. Let the server serve the former model again; or set SONGVEC_EMBEDDING_MODEL to "
                    "a name that stands for the new one, and `songvec swap`; or confirm the change for one run "
                    "(`--confirm-model-change`, `confirm_model_change` in the run config): searches then compare "
                    "vectors of both, until all songs are embedded again"
                )
            schema.write_value(connection, key, encoded)
