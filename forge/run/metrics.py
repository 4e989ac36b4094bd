"""Reads a run's metrics.jsonl."""

from pathlib import Path
from typing import Any

from forge.config.former_names import current_metrics
from forge.run.files import read_json_lines


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl by the current names of the metrics; none if there is no file yet."""
    return [current_metrics(row) for row in read_json_lines(file)]
