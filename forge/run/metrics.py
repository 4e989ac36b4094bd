"""Reads a run's metrics.jsonl."""

import logging
from pathlib import Path
from typing import Any

from forge.config.former_names import current_metrics
from forge.run.files import read_json_lines

logger = logging.getLogger(__name__)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl by the current names of the metrics; none if there is no file yet.

    A row without the number of its step, which forge did not write, is left out with a warning.
    """
    rows = read_json_lines(file)
    sound = [row for row in rows if type(row.get("step")) is int and isinstance(row.get("stage", ""), str)]
    if len(sound) < len(rows):
        logger.warning("%s: %d rows without a step are left out", file, len(rows) - len(sound))
    return [current_metrics(row) for row in sound]
