"""The types of config values, and how each is read from the text that was written."""

import math
import os
from contextlib import suppress
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class PlainText(str):
    """A scalar written without quotes."""

    def value(self) -> Any:
        """Return its meaning where no field gives a type: a boolean or a number if it looks like one, else the text."""
        if self.lower() in BOOLEANS:
            return BOOLEANS[self.lower()]
        if any(c in "0123456789" for c in self):
            for read in (int, float):
                with suppress(ValueError):
                    if math.isfinite(number := read(self)):
                        return number
        return str(self)


def _read_bool(value: Any) -> Any:
    """Read a boolean from a word; `1` and `0` are refused, since they are usually a number in the wrong place."""
    if isinstance(value, str):
        if value.lower() not in BOOLEANS:
            raise ValueError("must be true or false")
        return BOOLEANS[value.lower()]
    return value


def _read_open_map(value: Any) -> Any:
    """Give types to the scalars of a map whose keys forge does not know."""
    if isinstance(value, dict):
        return {key: _read_open_map(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_open_map(item) for item in value]
    return value.value() if isinstance(value, PlainText) else value


Bool = Annotated[bool, BeforeValidator(_read_bool)]
OpenMap = Annotated[dict[str, Any], BeforeValidator(_read_open_map)]
Positive = Annotated[int, Field(gt=0)]
Text = Annotated[
    str, Field(min_length=1), BeforeValidator(lambda value: str(value) if isinstance(value, str) else value)
]


def _from_home(name: str) -> str:
    return os.path.expanduser(name) if name.startswith("~") else name


Place = Annotated[Text, AfterValidator(_from_home)]
"""A path, or a name that may be one: relative to the working directory, and `~` is the home directory."""


def _ascending(numbers: list[int]) -> list[int]:
    if numbers != sorted(set(numbers)):
        raise ValueError(f"must be ascending, each number once, such as {sorted(set(numbers))}")
    return numbers


Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_ascending)]


class Section(BaseModel):
    """A section of the config: frozen, without unknown keys and without infinite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )
