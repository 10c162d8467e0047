"""How a setting is read: from a given value, its variable, or, if it is a secret, a file.

Docker and Kubernetes mount secrets as files: `POSTGRES_URL_FILE` names the one that holds `POSTGRES_URL`.
When to add here: another place that settings come from. Keep out: the settings (`settings`). No error shows a secret.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from songvec_assets.errors import SettingsError

_OF_KUBERNETES = re.compile(r"_SERVICE_HOST$|_PORT(_\w+)?$")
"""Variables that Kubernetes sets in every container, for each service."""


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return name.upper() if name.startswith(("postgres_", "fireworks_")) else f"SONGVEC_{name.upper()}"


def file_variable(name: str) -> str:
    """The variable that names the file of a secret."""
    return f"{name}_FILE"


def is_set(name: str) -> bool:
    """Whether the environment has a setting, or names the file that holds it."""
    return any(os.environ.get(each, "").strip() for each in (name, file_variable(name)))


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a name that is nearly a setting's: with a misspelled budget a run would have none.

    Args:
        names: of variables; those that are like no setting may be anyone's.
        known: the variables of all settings.

    Raises:
        SettingsError: has both names.
    """
    for name in {*names}.difference(known):
        if name.startswith("SONGVEC_") and not _OF_KUBERNETES.search(name):
            for meant in get_close_matches(name, known, n=1, cutoff=0.9):
                raise SettingsError(f"expected {meant}, got {name}, which is no setting: correct it, or unset it")


class Group(BaseSettings):
    """Settings from explicit values, else the environment, else their defaults.

    Args:
        given: values by the setting's name or a variable's; None or empty: not given.

    Raises:
        SettingsError: a value does not parse; one line names the variable and, unless it is a secret, the value.
    """

    model_config = SettingsConfigDict(
        alias_generator=variable,
        case_sensitive=True,
        frozen=True,
        str_strip_whitespace=True,
        allow_inf_nan=False,
        validate_default=False,
        use_attribute_docstrings=True,
    )

    def __init__(self, **given: Any) -> None:
        fields = {variable(name): field for name, field in type(self).model_fields.items()}
        secrets = {file_variable(name): name for name, field in fields.items() if not field.repr}
        named = {
            name if name in fields or name in secrets else variable(name): value
            for name, value in given.items()
            if value is not None and str(value).strip()
        }
        named |= read_secrets(secrets.values(), named)
        try:
            super().__init__(**{name: value for name, value in named.items() if name not in secrets})
        except ValidationError as error:
            first = error.errors()[0]
            name, value = str(first["loc"][0]), first["input"]
            if name not in fields:
                raise TypeError(f"{type(self).__name__} has no setting for {name}") from None
            expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            expected = re.sub("^(greater|less)", r"a number \1", expected)
            came = repr(value) if fields[name].repr else type(value).__name__
            # not chained: pydantic's error shows the values, secrets among them
            raise SettingsError(f"{name}: expected {expected}, got {came}") from None

    @model_validator(mode="before")
    @classmethod
    def _drop_blank(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if str(value).strip()}


def read_secrets(names: Iterable[str], given: Mapping[str, Any]) -> dict[str, str]:
    """The secrets that are in files.

    Args:
        names: variables of the secrets.
        given: values by variable, those of files included. A secret's value replaces a file that the environment names.

    Raises:
        SettingsError: a secret is set twice, or its file cannot be read, is empty or is not text.
    """
    found = {}
    for name in names:
        file = file_variable(name)
        if given.get(name) and not given.get(file):
            continue
        path = given.get(file) or os.environ.get(file, "").strip()
        if not path:
            continue
        if given.get(name) or os.environ.get(name, "").strip():
            raise SettingsError(f"{name} and {file} are both set: unset one of them")
        found[name] = _read(file, Path(path))
    return found


def _read(variable: str, path: Path) -> str:
    try:
        # editors and `echo` end a file with a line end
        secret = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(
            f"{variable} names {path}, which cannot be read ({error.strerror}): correct the path, or let this user "
            "read the file"
        ) from None
    except UnicodeDecodeError:
        # not chained: the error holds the bytes
        raise SettingsError(
            f"{variable} names {path}, which is not UTF-8 text: write the secret alone into it"
        ) from None
    if not secret:
        raise SettingsError(f"{variable} names {path}, which is empty: write the secret into it, or unset {variable}")
    return secret
