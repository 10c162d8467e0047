"""Secrets from files: which are read, which are refused, without showing them. `test_settings` has the rest."""

import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest

from songvec_assets import Pipeline
from songvec_assets.errors import SettingsError
from songvec_assets.settings import GROUPS, RunSettings, Settings, variables
from songvec_assets.settings_group import check_names, file_variable, is_set

URL = "postgresql://ann:geheim@db/songs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{URL}\n")
    return path


def read(**environment: object) -> Settings:
    """Settings of an environment that holds these variables, and a key."""
    with mock.patch.dict(os.environ, {name: str(value) for name, value in environment.items()}):
        return Settings(fireworks_api_key="k")


def test_every_secret_can_be_in_a_file() -> None:
    secrets = {name for group in GROUPS for name, field in group.model_fields.items() if not field.repr}
    assert {"POSTGRES_URL_FILE", "FIREWORKS_API_KEY_FILE", "SONGVEC_WEBHOOK_URL_FILE"} <= {*variables()}
    assert sum(name.endswith("_FILE") and name.removesuffix("_FILE") in variables() for name in variables()) == len(
        secrets
    )


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_a_secret_is_read_from_its_file_without_the_line_end(file: Path, end: str) -> None:
    file.write_bytes(f"{URL}{end}".encode())
    assert read(POSTGRES_URL_FILE=file).postgres_url == URL


def test_a_group_reads_the_files_of_its_own_secrets_only(file: Path) -> None:
    with mock.patch.dict(os.environ, {"SONGVEC_WEBHOOK_URL_FILE": str(file), "POSTGRES_URL_FILE": "/nowhere"}):
        assert RunSettings().webhook_url == URL


def test_a_given_value_replaces_the_file_and_a_blank_name_is_none(file: Path) -> None:
    with mock.patch.dict(os.environ, {"POSTGRES_URL_FILE": str(file), "SONGVEC_WEBHOOK_URL_FILE": "  "}):
        assert Settings(postgres_url="postgresql://x/y", fireworks_api_key="k").postgres_url == "postgresql://x/y"
        assert Settings(postgres_url="", fireworks_api_key="k").postgres_url == URL


def test_dotenv_may_name_the_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(f"POSTGRES_URL_FILE={file}\nFIREWORKS_API_KEY=k\n")
    monkeypatch.chdir(tmp_path)
    assert Pipeline.from_env().settings.postgres_url == URL


def test_a_secret_that_is_set_twice_is_refused(file: Path) -> None:
    with pytest.raises(SettingsError, match=r"^POSTGRES_URL and POSTGRES_URL_FILE are both set: unset one of them$"):
        read(POSTGRES_URL=URL, POSTGRES_URL_FILE=file)
    with (
        mock.patch.dict(os.environ, {"POSTGRES_URL": URL}),
        pytest.raises(SettingsError, match="are both set"),
    ):
        Settings(POSTGRES_URL_FILE=str(file))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b" \n", "is empty"), (b"geheim\xff\n", "is not UTF-8 text")]
)
def test_a_file_that_holds_no_secret_is_refused_by_its_variable_and_path(
    file: Path, content: bytes, words: str
) -> None:
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^POSTGRES_URL_FILE names {file}, which {words}: ") as refusal:
        read(POSTGRES_URL_FILE=file)
    assert refusal.value.__suppress_context__ or not refusal.value.__context__, "it holds the file's bytes"
    assert "geheim" not in "".join(traceback.format_exception(refusal.value))


@pytest.mark.parametrize(("path", "words"), [("none", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"^POSTGRES_URL_FILE names .* cannot be read \({words}\): correct the path"
    ):
        read(POSTGRES_URL_FILE=tmp_path / path)


def test_a_value_of_a_file_is_checked_like_a_variables_and_stays_secret(file: Path) -> None:
    file.write_text("fw_geheim fw_geheim\n")
    with (
        mock.patch.dict(os.environ, {"FIREWORKS_API_KEY_FILE": str(file)}),
        pytest.raises(SettingsError, match="FIREWORKS_API_KEY contains a space") as refusal,
    ):
        Settings()
    assert "geheim" not in "".join(traceback.format_exception(refusal.value))


def test_the_environment_has_a_secret_if_it_names_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_set("POSTGRES_URL")
    monkeypatch.setenv(file_variable("POSTGRES_URL"), " ")
    assert not is_set("POSTGRES_URL")
    monkeypatch.setenv(file_variable("POSTGRES_URL"), "/run/secrets/postgres_url")
    assert is_set("POSTGRES_URL")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SONGVEC_MAX_UDS", "SONGVEC_MAX_USD"),
        ("SONGVEC_TARGET_RECAL", "SONGVEC_TARGET_RECALL"),
        ("SONGVEC_EMBEDDINGS_MODEL", "SONGVEC_EMBEDDING_MODEL"),
        ("SONGVEC_Max_USD_A_MONTH", "SONGVEC_MAX_USD_A_MONTH"),
    ],
)
def test_a_misspelled_setting_is_refused_by_the_commands_python_and_dagster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "5")
    refused = f"expected {meant}, got {name}, which is no setting: correct it, or unset it"
    with pytest.raises(SettingsError, match=refused):
        Pipeline.from_env()
    for code in ("from songvec_assets.cli import main; main()", "import songvec_assets.definitions"):
        ended = subprocess.run(
            [sys.executable, "-c", code, "estimate"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 1
        assert refused in " ".join(ended.stderr.split()), ended.stderr


def test_a_misspelled_setting_in_dotenv_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SONGVEC_MAX_UDS=5\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="expected SONGVEC_MAX_USD, got SONGVEC_MAX_UDS"):
        Pipeline.from_env()


def test_names_that_are_like_no_setting_are_anyones() -> None:
    kubernetes = [
        f"SONGVEC_{name}" for name in ("PORT", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_80_TCP")
    ]
    served = [name.replace("SONGVEC_", "SONGVEC_SERVE_") for name in kubernetes]
    check_names([*variables(), *kubernetes, *served, "SONGVEC_TEAM", "MAX_UDS", "POSTGRES_USER"], variables())
