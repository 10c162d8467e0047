"""Search from any program that speaks SQL, here with psycopg: only the query's vector comes from the package."""

import psycopg2

from songvec_assets import Pipeline

NEAREST = """
    SELECT name, artist, 1 - (embedding <=> %(query)s::vector) AS similarity
    FROM song_embeddings JOIN songs ON songs.id = song_embeddings.song_id
    ORDER BY embedding <=> %(query)s::vector LIMIT 5
"""

with Pipeline.from_env() as songs:
    query = songs.embed_query("whales singing in the deep")
    connection = psycopg2.connect(songs.database.adbc_uri)  # or the URL that your program has
with connection, connection.cursor() as cursor:
    # searches visit the lists that gave the target recall when the index was built
    cursor.execute(
        "SELECT set_config('ivfflat.probes', value #>> '{}', true) FROM songvec.settings WHERE key = 'probes'"
    )
    cursor.execute(NEAREST, {"query": str(query.tolist())})
    for name, artist, similarity in cursor:
        print(f"{similarity:.3f}  {name} — {artist}")
