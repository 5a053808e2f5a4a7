"""The base of every config section: a frozen pydantic model that refuses unknown keys and documents each key."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of the config. It is a class beside the code that it configures; `config.py` only composes them."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def key(default: Any, meaning: str, *, unit: str | None = None, **constraints: Any) -> Any:
    """Declares a config key: its default (`...` where it must be given), meaning and unit.

    `constraints` are pydantic's (`gt`, `ge`, `le`, `min_length`, ...). `maxlm config --help-keys` prints all three.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit} if unit else None, **constraints)
