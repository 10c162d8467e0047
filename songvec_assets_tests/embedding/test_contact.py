"""How long a failing server is tried again, and what is said at the end."""

import asyncio
from dataclasses import dataclass, field

import pytest

from songvec_assets.embedding import contact as contact_module
from songvec_assets.embedding.contact import ServerContact
from songvec_assets.embedding.embedder import Patience
from songvec_assets.embedding.transport import Failure
from songvec_assets.errors import ProviderError, ProviderUnavailableError

URL = "http://127.0.0.1:9/v1"
BUSY = Failure("status 503", "answered 503", 503)
CLOSED = Failure("connection", "refused", sent=False, first_patience_s=12.0, advice="nothing listens there")
PAGE = Failure("malformed", "a page", first_patience_s=3.0, advice="correct the URL")


@dataclass(frozen=True)
class FakePatience(Patience):
    """Time passes only while somebody sleeps."""

    now: list[float] = field(default_factory=lambda: [1000.0])

    async def sleep(self, seconds: float) -> None:
        self.now[0] += seconds


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> FakePatience:
    """A minute, of which the longest wait is used each time."""
    notes: list[str] = []
    patience = FakePatience(seconds=60.0, on_trouble=notes.append)
    monkeypatch.setattr(contact_module.time, "monotonic", lambda: patience.now[0])
    monkeypatch.setattr(contact_module.random, "uniform", lambda _, most: most)
    return patience


def try_until_the_end(
    contact: ServerContact, failure: Failure, patience: FakePatience
) -> tuple[list[float], Exception]:
    """The waits, and what ends them."""
    waits: list[float] = []
    try:
        for n_retries in range(1, 100):
            before = patience.now[0]
            contact.count_try(failure, before)
            asyncio.run(contact.wait_to_try_again(failure, n_retries))
            waits.append(patience.now[0] - before)
    except ProviderError as error:
        return waits, error
    raise AssertionError("it is tried for ever")


def test_waits_double_until_the_patience_would_be_exceeded(patience: FakePatience) -> None:
    contact = ServerContact(URL, patience)
    contact.count_good()
    waits, error = try_until_the_end(contact, BUSY, patience)
    assert waits == [0.5, 1, 2, 4, 8, 16]
    assert isinstance(error, ProviderUnavailableError)
    assert "gave no good answer for 60 s (SONGVEC_PATIENCE_S), last: answered 503" in str(error)


def test_a_good_answer_of_any_request_begins_the_patience_again(patience: FakePatience) -> None:
    contact = ServerContact(URL, patience)
    for _ in range(3):
        contact.count_good()
        for n_retries in range(1, 7):
            asyncio.run(contact.wait_to_try_again(BUSY, n_retries))
    assert contact.has_answered
    assert contact.last_good_at < patience.now[0]


def test_after_a_429_it_waits_five_seconds_at_most_unless_the_server_names_a_time(patience: FakePatience) -> None:
    contact = ServerContact(URL, patience)
    asyncio.run(contact.wait_to_try_again(Failure("status 429", "slow down", 429), 30))
    assert patience.now[0] == 1005
    asyncio.run(contact.wait_to_try_again(Failure("status 429", "slow down", 429, retry_after_s=20.0), 1))
    assert patience.now[0] == 1025


@pytest.mark.parametrize(
    ("failure", "kind", "code", "seconds"),
    [
        (CLOSED, ProviderUnavailableError, "provider.unreachable", 12),
        (PAGE, ProviderError, "provider.wrong-url", 3),
    ],
)
def test_a_url_that_never_worked_is_given_up_soon(
    patience: FakePatience, failure: Failure, kind: type[Exception], code: str, seconds: float
) -> None:
    waits, error = try_until_the_end(ServerContact(URL, patience), failure, patience)
    assert sum(waits) <= seconds
    assert (type(error), error.code) == (kind, code)
    assert f"{URL}/embeddings" in str(error)
    assert failure.advice in str(error)


def test_a_url_that_worked_once_has_the_whole_patience(patience: FakePatience) -> None:
    contact = ServerContact(URL, patience)
    contact.count_good()
    waits, error = try_until_the_end(contact, CLOSED, patience)
    assert sum(waits) > 12
    assert "SONGVEC_PATIENCE_S" in str(error)


def test_another_failure_in_between_begins_the_short_patience_again(patience: FakePatience) -> None:
    contact = ServerContact(URL, patience)
    for failure in (PAGE, BUSY, PAGE, BUSY, PAGE):
        contact.count_try(failure, patience.now[0])
        asyncio.run(contact.wait_to_try_again(failure, 2))
    assert patience.now[0] == 1005


def test_a_long_wait_for_the_first_answer_is_told_again_and_again_and_no_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contact_module, "FIRST_NOTE_S", 0.01)
    monkeypatch.setattr(contact_module, "NOTE_EVERY_S", 0.01)
    notes: list[str] = []

    async def wait(contact: ServerContact, until: int) -> None:
        with contact.reporting_the_wait():
            while len(notes) < until:
                await asyncio.sleep(0.01)

    contact = ServerContact(URL, Patience(on_trouble=notes.append))
    asyncio.run(wait(contact, 2))
    assert all("no answer after" in note for note in notes)
    contact.count_good()
    n_before = len(notes)

    async def look() -> None:
        with contact.reporting_the_wait():
            await asyncio.sleep(0.05)

    asyncio.run(look())
    assert len(notes) == n_before
