"""What FIREWORKS_BASE_URL may be; that settings ask for it stands in test_settings."""

import pytest

from songvec_assets.base_url import check_base_url
from songvec_assets.errors import SettingsError


@pytest.mark.parametrize(
    "url", ["https://api.fireworks.ai/inference/v1", "http://localhost:8000", "http://[::1]:8080/v1", "https://x/a/b"]
)
def test_the_root_of_an_api_is_accepted(url: str) -> None:
    check_base_url(url)


@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:8000", "", "http://", "http://x:99999/v1", "http://x:0/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="with a host and a valid port"):
        check_base_url(url)


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("https://x/v1/embeddings", "https://x/v1"),
        ("https://x/v1/chat/completions/", "https://x/v1"),
        ("https://x/v1/models", "https://x/v1"),
        ("https://x/v1?api-version=1", "https://x/v1, or a gateway"),
        ("https://x/v1#top", "https://x/v1"),
    ],
)
def test_another_path_of_an_api_is_refused_with_its_root(url: str, root: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_base_url(url)
    assert f"set FIREWORKS_BASE_URL={root}" in str(caught.value)


def test_a_password_in_it_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingsError, match="use FIREWORKS_API_KEY") as caught:
        check_base_url("https://ann:secret@x/v1")
    assert "secret" not in str(caught.value)
