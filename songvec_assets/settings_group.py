"""How a group of settings is read: explicit values, else the environment, else defaults; and what an error says.

When to add here: another way to give or to refuse a value. Keep out: the settings (`settings`).
"""

import re
from typing import Any

from pydantic import ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from songvec_assets.errors import SettingsError


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return name.upper() if name.startswith(("postgres_", "fireworks_")) else f"SONGVEC_{name.upper()}"


class Group(BaseSettings):
    """Settings from explicit values, else the environment, else their defaults.

    Args:
        given: values by the setting's name or its variable's; None or empty: not given.

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
        named = {name if name in fields else variable(name): value for name, value in given.items()}
        try:
            super().__init__(**{name: value for name, value in named.items() if value not in (None, "")})
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
