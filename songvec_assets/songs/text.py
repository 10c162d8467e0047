"""From a song to the text that is embedded, and the text's identity. Pure.

Lengths are characters (Unicode code points). The limit is a setting and never follows an estimate: a text that is cut
at another length is another text, and would be paid for again.
When to add here: another step between a song and its text. Keep out: reading songs, and sending texts.
"""

import string
import unicodedata
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from songvec_assets.errors import SettingsError
from songvec_assets.settings import DEFAULT_TEMPLATE

if TYPE_CHECKING:  # a search knows the fields of a text, and needs no frames
    import polars as pl

TEXT_HASH_BYTES = 16

NO_PROMPT = "{text}"

FIELDS = ("name", "artist", "lyrics")


@dataclass(frozen=True)
class TextSpec:
    """How a song becomes a text.

    Attributes:
        template: text with the fields {name}, {artist} and {lyrics}; literal braces are doubled.
        max_chars: longer texts are cut to n characters, not counting the prompt.
        document_prompt: what the model expects around each text; contains `{text}` once.
    """

    template: str = DEFAULT_TEMPLATE
    max_chars: int = 24_000
    document_prompt: str = NO_PROMPT

    @property
    def identity(self) -> str:
        """A hash of these settings."""
        # without a prompt it is that of versions without prompts, so that ranges they completed stay complete
        prompt = "" if self.document_prompt == NO_PROMPT else f"\0{self.document_prompt}"
        return hash_text(f"{self.max_chars}:{self.template}{prompt}").hex()

    @property
    def fields(self) -> frozenset[str]:
        """The fields that the template names."""
        return frozenset(field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None)

    @property
    def required(self) -> frozenset[str]:
        """The fields without which a song is not embedded; lyrics only if nothing else is named."""
        return self.fields & {"name", "artist"} or self.fields

    def __post_init__(self) -> None:
        try:
            parsed = [piece for piece in string.Formatter().parse(self.template) if piece[1] is not None]
        except ValueError as error:
            raise SettingsError(f"SONGVEC_TEXT_TEMPLATE does not parse ({error}): {self.template!r}") from error
        if not parsed or any(field not in FIELDS or spec or conversion for _, field, spec, conversion in parsed):
            raise SettingsError(
                f"SONGVEC_TEXT_TEMPLATE must name some of {{name}}, {{artist}}, {{lyrics}} and nothing else, "
                f"got {self.template!r}"
            )


def render_texts(songs: "pl.DataFrame", spec: TextSpec) -> "pl.DataFrame":
    """Render each song's embedding text.

    Args:
        songs: columns song_id, name, artist, lyrics; nulls are rendered as empty strings.

    Returns:
        Columns song_id (Int32), text (String, as sent: NFC, without surrounding white space, with the prompt),
        text_hash (Binary, 16 bytes) and truncated (Boolean), in the order of `songs`.
    """
    import polars as pl

    rendered = songs.select(pl.concat_str(_pieces(spec.template))).to_series().to_list()
    # Python's NFC copies only what changes: 50,000 songs take 10 ms; that of polars takes a second
    whole = [unicodedata.normalize("NFC", text).strip() for text in rendered]
    before, _, after = spec.document_prompt.partition(NO_PROMPT)
    texts = [f"{before}{text[: spec.max_chars].rstrip()}{after}" for text in whole]
    return songs.select("song_id").with_columns(
        text=pl.Series(texts, dtype=pl.String),
        text_hash=pl.Series([hash_text(text) for text in texts], dtype=pl.Binary),
        truncated=pl.Series([len(text) > spec.max_chars for text in whole], dtype=pl.Boolean),
    )


def hash_text(text: str) -> bytes:
    """The 128-bit identity of a rendered text (BLAKE2b of its UTF-8 bytes)."""
    return blake2b(text.encode(), digest_size=TEXT_HASH_BYTES).digest()


def _pieces(template: str) -> "list[pl.Expr]":
    """The template as literals and columns, in their order."""
    import polars as pl

    pieces = []
    for literal, field, _, _ in string.Formatter().parse(template):
        pieces.append(pl.lit(literal))
        if field is not None:
            pieces.append(pl.col(field).fill_null(""))
    return pieces
