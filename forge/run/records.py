"""Records: the JSON files of a run as models whose keys and types are checked in one place when they are read."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from forge.errors import UsageError
from forge.run.files import path_as_text


class Record(BaseModel):
    """A JSON object of which this forge knows every key: one that it does not know comes from a newer forge."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class OpenRecord(Record):
    """A JSON object that may hold more keys, such as those of a task; they are kept when it is written again."""

    model_config = ConfigDict(extra="allow")


R = TypeVar("R", bound=Record)


def read_record(kind: type[R], path: Path, advice: str) -> R:
    """Read and check a file. Raises UsageError with its name, the key, the value and the advice if it is not sound."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); is its folder a run directory?") from None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise UsageError(_sentence(error, path, advice)) from None


def record_of(kind: type[R], values: dict[str, Any]) -> R:
    """Check values as if they had just been read from a file. Raises pydantic's ValidationError."""
    return kind.model_validate_json(json.dumps(values, default=path_as_text))


def reason(error: ValidationError) -> str:
    """Say in a clause what is wrong with a record: `step is '7': input should be a valid integer`."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"it is not JSON ({first['ctx']['error']})"
    key, message = ".".join(map(str, first["loc"])), first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return f"{key} is missing"
    return f"{key or 'it'} is {_shortened(first['input'])}: {message}"


def unknown_keys(error: ValidationError) -> list[str]:
    """Return the keys that this forge does not know, which a newer one wrote."""
    return [".".join(map(str, item["loc"])) for item in error.errors() if item["type"] == "extra_forbidden"]


def _sentence(error: ValidationError, path: Path, advice: str) -> str:
    if unknown := unknown_keys(error):
        return (
            f"{path} was written by a newer forge: this version does not know {', '.join(unknown)}; update forge to "
            "use this run"
        )
    return f"{path} is broken: {reason(error)}; {advice}"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
