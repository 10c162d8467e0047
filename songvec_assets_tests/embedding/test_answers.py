"""What a bad answer means, by its status, its words and its headers."""

import pytest

from songvec_assets.embedding import answers
from songvec_assets.errors import ProviderError, RequestRefusedError, RequestTooLargeError

BASE = "http://127.0.0.1:11434/v1"


@pytest.mark.parametrize(
    ("status", "body", "meant"),
    [
        (200, b'{"data":[]}', 200),
        (200, b'{"error":{"code":429,"message":"slow down"}}', 429),
        (200, b'{"error":{"code":"503"}}', 503),
        (200, b'\xef\xbb\xbf{"error":{"code":400}}', 400),
        (200, b'{"error":"no such path"}', 500),
        (200, b'{"error":{"code":"overloaded"}}', 500),
        (200, b'{"error":{"code":200}}', 500),
        (503, b'{"error":{"code":"overloaded"}}', 503),
        (502, b"<html>", 502),
    ],
)
def test_the_status_of_an_error_in_the_body_counts_more(status: int, body: bytes, meant: int) -> None:
    assert answers.status_of(status, body) == meant


@pytest.mark.parametrize(
    ("status", "body", "is_first", "kind", "code"),
    [
        (401, b"", False, ProviderError, "provider.key-refused"),
        (402, b"", False, ProviderError, "provider.billing"),
        (410, b"", False, ProviderError, "provider.model-not-served"),
        (501, b"", False, ProviderError, "provider.wrong-url"),
        (400, b"", False, RequestRefusedError, RequestRefusedError.code),
        (413, b"", False, RequestTooLargeError, RequestTooLargeError.code),
        (500, b"unknown parameter: dimensions", True, RequestRefusedError, RequestRefusedError.code),
    ],
)
def test_a_status_ends_the_run_or_refuses_one_request(
    status: int, body: bytes, is_first: bool, kind: type[ProviderError], code: str
) -> None:
    refusal = answers.find_refusal(status, body, "words", is_first)
    assert (type(refusal), refusal and refusal.code, str(refusal)) == (kind, code, "words")


@pytest.mark.parametrize(("status", "is_first"), [(500, True), (503, False), (424, False), (429, True)])
def test_any_other_status_is_tried_again(status: int, is_first: bool) -> None:
    assert answers.find_refusal(status, b"", "words", is_first) is None


def test_a_parameter_is_at_fault_only_before_anything_worked() -> None:
    assert answers.find_refusal(500, b"dimensions", "words", is_first=False) is None


def test_the_words_say_what_came_in_one_line_and_what_to_do() -> None:
    assert answers.describe_answer(503, "too\n  busy", 503, BASE) == "answered 503: too busy"
    assert answers.describe_answer(429, "slow", 200, BASE) == "answered 429: slow, inside of a 200"
    assert "FIREWORKS_API_KEY" in answers.describe_answer(401, "", 401, BASE)
    native = answers.describe_answer(404, "", 404, "http://127.0.0.1:11434/api")
    assert native.endswith(f"{BASE})"), "the URL to set"
    assert len(answers.describe_answer(503, "x" * 5000, 503, BASE)) < 350


@pytest.mark.parametrize(
    ("location", "advice"),
    [
        ("https://host/v1/embeddings", "set FIREWORKS_BASE_URL=https://host/v1"),
        ("/v2/embeddings/", "set FIREWORKS_BASE_URL=http://127.0.0.1:11434/v2"),
        ("https://host/v1/embeddings?token=1", "correct FIREWORKS_BASE_URL"),
        ("https://host/login", "correct FIREWORKS_BASE_URL"),
    ],
)
def test_a_redirect_is_refused_with_the_url_to_set(location: str, advice: str) -> None:
    refusal = answers.refuse_redirect(f"{BASE}/", 301, location)
    assert (refusal.code, str(refusal).endswith(f"the key was not sent: {advice}")) == ("provider.wrong-url", True)


@pytest.mark.parametrize(
    ("body", "is_native"),
    [
        (b'{"embeddings":[[1,2]]}', True),
        (b'{"embedding":[1,2]}', True),
        (b'{"object":"list","data":[]}', False),
        (b"[]", False),
        (b"<html>", False),
    ],
)
def test_an_answer_of_the_servers_own_api_is_known(body: bytes, is_native: bool) -> None:
    assert answers.is_native_answer(body) == is_native


@pytest.mark.parametrize(
    ("url", "compatible"),
    [
        ("http://host:1/api", "http://host:1/v1"),
        ("http://host:1/api/embed/", "http://host:1/v1"),
        ("http://host:1/v1", None),
        ("http://api.host/v1", None),
    ],
)
def test_the_compatible_url_beside_a_servers_own(url: str, compatible: str | None) -> None:
    assert answers.compatible_base_of(url) == compatible


@pytest.mark.parametrize(
    ("words", "n_texts", "hint"),
    [
        ("batch size 33 > maximum allowed batch size 32", 33, 32),
        ("at most 100 requests can be in one batch", 256, 100),
        ("batch size is invalid, it should not be larger than 10.: input.contents", 25, 10),
        ("at most 100 requests", 100, None),
        ("maximum 0", 5, None),
        ("Invalid value", 64, None),
        ("limit of 50, at most 20", 64, 20),
    ],
)
def test_a_refusal_may_name_the_number_of_texts(words: str, n_texts: int, hint: int | None) -> None:
    assert answers.hinted_texts(words, n_texts) == hint


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1.5", 1.5), ("-3", 0.0), ("86400", 600.0), ("nan", None), ("inf", None), ("", None), ("soon", None)],
)
def test_a_time_to_wait_is_bounded(value: str, seconds: float | None) -> None:
    assert answers.parse_retry_after(value, "Sun, 29 Nov 2026 08:00:00 GMT") == seconds
