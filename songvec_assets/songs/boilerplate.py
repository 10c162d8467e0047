"""Boilerplate in lyrics: time stamps and remains of web pages, found in a sample before they are paid for.

When to add here: a pattern of text that is clearly not lyrics. Keep out: headings like [Chorus], which many catalogues
have and which cost little; and changes to texts: the user makes them in a view. Patterns use the syntax that both Rust
(polars) and PostgreSQL understand. Sizes are bytes of UTF-8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from songvec_assets.songs.ranges import SongIdRange
from songvec_assets.songs.source import SongsSource, as_bytes, literal

PATTERNS = {
    "LRC time stamps": r"[\[<]\d{1,3}:\d\d([.:]\d{1,3})?[\]>][ \t]*",
    "LRC headers": r"(^|\n)\[(ar|al|ti|au|by|re|ve|la|offset|length):[^\]\n]*\]",
    "“… Contributors … Lyrics” of Genius": r"^\s*\d+ Contributors?[^\n]*Lyrics",
    "“You might also like” of Genius": r"You might also like",
    "“Get tickets” of Genius": r"See [^\n]* LiveGet tickets as low as \$\d+",
    "“Embed” of Genius at the end": r"\d*(\.\d+)?K?Embed\s*$",
    "the notice of Musixmatch": r"\*+ This Lyrics is NOT for Commercial [uU]se \*+(\s*\(\d+\))?",
    "nothing but “Instrumental”": r"^\s*[\[(]?\s*[Ii]nstrumental\s*[\])]?\s*$",
}

SAMPLE_SONGS = 2_000
_MOST_RANGES = 200
_LEAST_SHARE = 0.01
"""Kinds that a smaller share of the songs has are not reported."""
_LINE_CHARS, _LINE_SONGS, _LINE_SHARE, _MOST_LINES = 25, 20, 0.02, 3


@dataclass(frozen=True)
class Boilerplate:
    """The boilerplate in a sample of lyrics.

    Attributes:
        n_songs: songs of the source.
        n_sampled: songs in the sample.
        n_found: sampled songs that have boilerplate.
        n_bytes, n_bytes_found: of all sampled lyrics, and of the boilerplate in them.
        kinds: number of sampled songs by kind of boilerplate, for kinds that enough songs have.
        lines: number of sampled songs by line, for lines that many songs share.
    """

    n_songs: int = 0
    n_sampled: int = 0
    n_found: int = 0
    n_bytes: int = 0
    n_bytes_found: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_common(self) -> bool:
        """Whether enough songs have boilerplate to report it."""
        return bool(self.kinds or self.lines)

    def describe(self, bytes_per_token: float) -> str:
        """One line: what was found, and about how many tokens of all songs it makes."""
        if not self.is_common:
            return f"no text that is no lyric was found in a sample of {self.n_sampled:,} songs"
        n_tokens = self.n_bytes_found / bytes_per_token * self.n_songs / self.n_sampled
        of_songs, of_bytes = self.n_found / self.n_sampled, self.n_bytes_found / self.n_bytes
        named = [f"{name} in {count:,}" for name, count in self.kinds.items()]
        named += [f"the line “{line[:60]}” in {count:,}" for line, count in self.lines.items()]
        return (
            f"{self.n_found:,} of {self.n_sampled:,} sampled songs ({of_songs:.0%}) have text that is no lyric: "
            f"{', '.join(named)}. It is {of_bytes:.0%} of all lyrics, about {n_tokens:,.0f} tokens or more of the "
            "catalogue, which are paid for and blur the vectors"
        )

    def view(self, source: SongsSource) -> str:
        """SQL of a view without the boilerplate, and the settings to embed it."""
        lyrics = f"{source.lyrics}::text"
        for name in self.kinds:
            lyrics = f"regexp_replace({lyrics}, {literal(PATTERNS[name])}, '', 'g')"
        for line in self.lines:
            lyrics = f"replace({lyrics}, {literal(line)}, '')"
        updated_at = f", {source.updated_at} AS updated_at" if source.updated_at else ""
        # the server quotes only names that need it
        schema, _, table = source.relation.rpartition(".")
        view = f'{table[:-1]}_clean"' if table.endswith('"') else f"{table}_clean"
        named = f"{schema}.{view}".replace('"', "")
        return (
            f"CREATE VIEW {schema}.{view} AS SELECT {source.song_id} AS song_id, {source.name} AS name, "
            f"{source.artist} AS artist, NULLIF(btrim({lyrics}, E' \\r\\n\\t'), '') AS lyrics{updated_at} "
            f"FROM {source.relation}; then set SONGVEC_SONGS_TABLE={named} SONGVEC_SONG_ID_COLUMN=song_id, and leave "
            "SONGVEC_NAME_COLUMN, SONGVEC_ARTIST_COLUMN and SONGVEC_LYRICS_COLUMN unset"
        )


def find_boilerplate(lyrics: Sequence[str], n_songs: int) -> Boilerplate:
    """Look for boilerplate. Pure.

    Args:
        lyrics: of a sample of songs, none empty.
        n_songs: songs of the source.
    """
    whole = rest = pl.Series(lyrics, dtype=pl.String)
    kinds = {}
    for name, pattern in PATTERNS.items():
        before, rest = rest, rest.str.replace_all(pattern, "")
        kinds[name] = int((before != rest).sum())
    # a line counts once per song
    lines = pl.DataFrame({"song": range(len(whole)), "line": rest.str.split("\n")}).explode("line")
    lines = lines.with_columns(pl.col("line").str.strip_chars()).unique()
    counts = lines.filter(pl.col("line").str.len_chars() >= _LINE_CHARS)["line"].value_counts()
    enough = max(_LINE_SONGS, _LINE_SHARE * len(whole))
    repeated = counts.filter(pl.col("count") >= enough).sort("count", descending=True).head(_MOST_LINES)
    of_kinds = pl.DataFrame({"song": range(len(whole)), "n_bytes": whole.str.len_bytes() - rest.str.len_bytes()})
    of_lines = lines.join(repeated, on="line").select("song", n_bytes=pl.col("line").str.len_bytes())
    found = pl.concat([of_kinds, of_lines]).group_by("song").sum().filter(pl.col("n_bytes") > 0)
    return Boilerplate(
        n_songs,
        len(whole),
        found.height,
        int(whole.str.len_bytes().sum()),
        int(found["n_bytes"].sum()),
        {name: count for name, count in kinds.items() if count >= max(1.0, _LEAST_SHARE * len(whole))},
        dict(repeated.iter_rows()),
    )


def sample_lyrics(source: SongsSource, ranges: Sequence[SongIdRange]) -> list[str]:
    """The lyrics of a few songs per range, without empty ones; if there are many ranges, only of some.

    Args:
        ranges: that hold songs.
    """
    some = ranges[:: -(-len(ranges) // _MOST_RANGES) or 1]
    if not some:
        return []
    edges = ", ".join(f"({each.start}::bigint, {each.stop}::bigint)" for each in some)
    rows = source.fetch(
        f"SELECT song.lyrics FROM (VALUES {edges}) AS edge (start, stop) CROSS JOIN LATERAL ("
        f"SELECT {as_bytes(source.lyrics)} AS lyrics FROM {source.relation} AS source "
        f"WHERE {source.song_id} >= edge.start AND {source.song_id} < edge.stop "
        f"ORDER BY source.{source.song_id} LIMIT {max(1, SAMPLE_SONGS // len(some))}) AS song",
    )
    texts = [bytes(lyrics).decode(source.codec, "replace") for (lyrics,) in rows if lyrics is not None]
    return [lyrics for lyrics in texts if lyrics.strip()]
