"""Parameters as they arrive, and the status of each error."""

import json
import math

import pytest

from songvec_assets.errors import SearchError, ServeError, SongvecError
from songvec_assets.search.nearest import Hit
from songvec_assets.serve.answers import STATUSES, Wanted, answer, answer_error, find_status, read_search, read_similar
from songvec_assets_tests.docs.test_operations import ROOT, read_codes


def test_what_is_given_is_wanted_and_the_rest_is_as_from_every_door() -> None:
    assert read_search(b"q=a+storm") == Wanted("a storm", 10, "vector", [], False)
    given = b"q=caf%C3%A9&limit=3&mode=hybrid&explain=true&where=artist+%3D+Ann&where=year%20in%201,2"
    where = [("artist", "=", "Ann"), ("year", "in", ["1", "2"])]
    assert read_search(given) == Wanted("café", 3, "hybrid", where, True)
    assert read_similar("-7", b"") == Wanted(-7, 10, "vector", [], False)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        (b"q=a&limit=ten", "search.invalid"),
        (b"q=a&limit=1_0", "search.invalid"),
        (b"q=a&limit=%D9%A3", "search.invalid"),
        (b"q=a&limit=" + b"9" * 5000, "search.invalid"),
        (b"q=a&limit=", "search.invalid"),
        (b"q=a&explain=1", "search.invalid"),
        (b"q=caf%E9", "search.invalid"),
        (b"q=caf\xc3\xa9", "search.invalid"),
        (b"q=a&where=year", "search.invalid"),
        (b"&".join([b"where=a%3D1"] * 101), "search.invalid"),
        (b"query=a", "serve.request"),
        (b"q=a&q=b", "serve.request"),
        (b"q=a&mode=text&mode=text", "serve.request"),
    ],
)
def test_what_does_not_parse_is_refused(query: bytes, code: str) -> None:
    with pytest.raises(SongvecError) as refused:
        read_search(query)
    assert refused.value.code == code


@pytest.mark.parametrize(("song_id", "query"), [("seven", b""), ("7.0", b""), ("7", b"q=a"), ("7", b"mode=text")])
def test_a_song_has_a_number_and_neither_words_nor_a_mode(song_id: str, query: bytes) -> None:
    with pytest.raises((SearchError, ServeError)):
        read_similar(song_id, query)


def test_each_code_has_a_status_that_says_whose_fault_it_is() -> None:
    found = {code: find_status(code) for code in read_codes(ROOT / "songvec_assets")}
    assert {*found.values()} == {400, 401, 402, 403, 404, 405, 409, 413, 421, 429, 500, 502, 503}
    assert all(status < 500 for code, status in found.items() if code.startswith(("search.", "budget.")))
    assert all(status >= 500 for code, status in found.items() if code.startswith(("provider.", "database.", "table.")))
    rows = {code for code in STATUSES if "." in code}
    assert rows <= found.keys(), "a code that no error carries"
    assert {code.partition(".")[0] for code in found} >= STATUSES.keys() - rows


def test_what_json_cannot_hold_is_null() -> None:
    response = answer({"hits": [Hit(1, "A", "B", None, math.nan)]})
    assert json.loads(response.body)["hits"][0]["similarity"] is None


def test_an_error_says_when_to_come_again() -> None:
    response = answer_error(ServeError("wait", "serve.rate"), **{"Retry-After": "7"})
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert json.loads(response.body) == {"error": {"code": "serve.rate", "message": "wait"}}
    assert answer_error(ServeError("who", "serve.unauthorized")).headers["www-authenticate"] == "Bearer"
