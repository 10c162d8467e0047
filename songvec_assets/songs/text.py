"""From a song to the text that is embedded, and the text's identity. Pure.

Lengths are characters (Unicode code points). The limit is a setting and part of what is hashed; it never moves
with an estimate, since a text that moved would be paid for again.
"""

import string
from dataclasses import dataclass
from hashlib import blake2b

import polars as pl

from songvec_assets.errors import SettingsError
from songvec_assets.settings import DEFAULT_TEMPLATE

TEXT_HASH_BYTES = 16

_FIELDS = ("name", "artist", "lyrics")


@dataclass(frozen=True)
class TextSpec:
    """How a song becomes a text.

    Attributes:
        template: text with the fields {name}, {artist} and {lyrics}; braces are doubled to stand for themselves.
        max_chars: longer texts are cut to this many characters.
    """

    template: str = DEFAULT_TEMPLATE
    max_chars: int = 24_000

    def __post_init__(self) -> None:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None]
        except ValueError as error:
            raise SettingsError(f"SONGVEC_TEXT_TEMPLATE does not parse ({error}): {self.template!r}") from error
        unknown = [field for field in fields if field not in _FIELDS]
        if unknown or not fields:
            raise SettingsError(
                f"SONGVEC_TEXT_TEMPLATE must name some of {{name}}, {{artist}}, {{lyrics}} and nothing else, "
                f"got {self.template!r}"
            )


def render_texts(songs: pl.DataFrame, spec: TextSpec) -> pl.DataFrame:
    """Render each song's embedding text.

    Args:
        songs: columns song_id, name, artist, lyrics (lyrics may be null: the song is its name and artist).
        spec: template and length limit.

    Returns:
        Columns song_id (Int32), text (String, NFC, without surrounding white space), text_hash (Binary,
        16 bytes) and truncated (Boolean), in the order of `songs`.
    """
    rendered = pl.concat_str(_pieces(spec.template)).str.normalize("NFC").str.strip_chars()
    texts = songs.select("song_id", rendered.alias("text")).with_columns(
        pl.col("text").str.head(spec.max_chars),
        truncated=pl.col("text").str.len_chars() > spec.max_chars,
    )
    hashes = [hash_text(text) for text in texts["text"].to_list()]
    return texts.with_columns(text_hash=pl.Series(hashes, dtype=pl.Binary)).select(
        "song_id", "text", "text_hash", "truncated"
    )


def embedding_text(name: str, artist: str, lyrics: str | None, spec: TextSpec) -> str:
    """One song's text; see `render_texts`."""
    songs = pl.DataFrame(
        {"song_id": [0], "name": [name], "artist": [artist], "lyrics": [lyrics]},
        schema_overrides={"lyrics": pl.String},
    )
    return str(render_texts(songs, spec)["text"][0])


def hash_text(text: str) -> bytes:
    """The 128-bit identity of a rendered text (BLAKE2b of its UTF-8 bytes)."""
    return blake2b(text.encode(), digest_size=TEXT_HASH_BYTES).digest()


def _pieces(template: str) -> list[pl.Expr]:
    """The template as literals and columns, in their order."""
    pieces = []
    for literal, field, _, _ in string.Formatter().parse(template):
        pieces.append(pl.lit(literal))
        if field is not None:
            pieces.append(pl.col(field).fill_null(""))
    return pieces
