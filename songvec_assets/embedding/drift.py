"""Whether a model's name still stands for the same model: its vector of a short text, compared with an earlier run's.

A provider may change the model behind a name. One table would then hold vectors that cannot be compared. The short text
that a client sends before any other shows it before a song is paid for.
"""

import base64
from dataclasses import dataclass

import numpy as np

from songvec_assets.embedding.wire import Float32Matrix
from songvec_assets.errors import ModelChangedError
from songvec_assets.postgres import schema
from songvec_assets.postgres.engine import Database

MIN_COSINE = 0.999
"""Of two vectors of one text by one model: number formats and hardware change less than a hundredth of that."""


@dataclass(frozen=True)
class ModelRecord:
    """The vector of the probe, as the database has it for one model and size.

    Attributes:
        database: every run on it compares with the same vector.
        model, dimensions: whose.
        is_confirmed: whether another vector than the recorded one is expected, and recorded in its place.
    """

    database: Database
    model: str
    dimensions: int
    is_confirmed: bool = False

    def check(self, vector: Float32Matrix) -> None:
        """Compare the probe's vector, (dimensions,), with the recorded one; record the first one of a model.

        Raises:
            ModelChangedError: they differ, and that is not confirmed.
        """
        key = f"probe of {self.model}, {self.dimensions} values"
        encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        with self.database.get_connection() as connection:
            recorded = schema.read_record(connection, key, bytes)
            known = np.frombuffer(recorded or b"", dtype="<f4").astype(np.float64)
            if len(known) != len(vector):  # none, or one that this version cannot read
                schema.write_first_fact(connection, key, encoded)
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
            schema.write_fact(connection, key, encoded)
