"""The tree of errors: each has a stable code, and the picture at the top of the module shows all of them."""

import re

import pytest

from songvec_assets import errors
from songvec_assets.errors import (
    ProviderUnavailableError,
    RequestRefusedError,
    RequestTooLargeError,
    SettingsError,
    SongvecError,
    describe,
)

ALL = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SongvecError)]


def depth(error: type[SongvecError]) -> int:
    return error.__mro__.index(SongvecError)


def test_the_picture_shows_each_error_below_its_base() -> None:
    drawn = re.findall(r"^ {4}([│├└─ ]*)(\w+Error)\b", errors.__doc__ or "", re.M)
    assert {name: len(branches) // 4 for branches, name in drawn} == {each.__name__: depth(each) for each in ALL}


def test_a_code_is_that_of_one_class_and_kinds_of_a_refused_request_share_one() -> None:
    own = [vars(each)["code"] for each in ALL if "code" in vars(each)]
    assert len(own) == len({*own})
    without = {each for each in ALL if "code" not in vars(each)} - {SongvecError}
    assert without == {*RequestRefusedError.__subclasses__(), *RequestTooLargeError.__subclasses__()}


def test_a_given_code_is_that_of_one_error_and_not_of_its_class() -> None:
    error = ProviderUnavailableError("closed", "provider.unreachable")
    assert (error.code, ProviderUnavailableError("late").code) == ("provider.unreachable", "provider.unavailable")


@pytest.mark.parametrize(
    ("error", "words"), [(SettingsError("wrong"), "wrong [settings.invalid]"), (KeyError("x"), "'x'"), (None, "None")]
)
def test_an_error_is_described_with_its_code(error: BaseException | None, words: str) -> None:
    assert describe(error) == words
