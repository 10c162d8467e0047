"""Search from any program that speaks SQL, here with psycopg: only the query's vector comes from the package.

docs/search.md makes that with curl.
"""

import psycopg2

from songvec_assets import Pipeline

NEAREST = """
    SELECT name, artist, similarity FROM songvec.search(%(query)s, 5) AS found JOIN songs ON songs.id = found.song_id
    ORDER BY similarity DESC
"""

with Pipeline.from_env() as songs:
    query = songs.embed_query("whales singing in the deep")
    connection = psycopg2.connect(songs.database.adbc_uri)  # or the URL that your program has
with connection, connection.cursor() as cursor:
    cursor.execute(NEAREST, {"query": str(query.tolist())})
    for name, artist, similarity in cursor:
        print(f"{similarity:.3f}  {name} — {artist}")
