"""Keeps the teacher's own numbers below the output root, by all that they depend on: evaluated once, read later."""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forge.config.former_names import current_metrics
from forge.config.schema import Config
from forge.model.origin import Origin
from forge.run.files import write_atomically
from forge.run.state import now
from forge.task.task import Task
from forge.teacher_cache.key import ContentKey, content_key, digest

logger = logging.getLogger(__name__)

FOLDER = ".teachers"  # below the output root; no run lies in a folder with a dot
METRICS = 1  # counts up when forge counts a metric otherwise, or has a new one: older numbers are evaluated anew
DIGITS = 16  # of the digest, in a file's name


@dataclass(frozen=True)
class TeacherNumbers:
    """An evaluation of a teacher."""

    metrics: dict[str, Any]  # by `split/metric`, as every evaluation has them
    made_by: str  # the run, or the command, that evaluated it
    made_at: str  # UTC


def numbers_key(config: Config, task: Task, origin: Origin, dtype: str) -> ContentKey:
    """All that a teacher's numbers depend on.

    origin: of the teacher, with its hashes. dtype: that it computes in, such as float32.
    """
    sampled = config.evaluation.max_rows
    return {
        **content_key(config, task, origin, dtype),
        "teacher.labels": config.teacher.labels,
        "forge's metrics": METRICS,
        "evaluation.max_samples": sampled,  # the former name: another one would make every stored file useless
        "training.seed": config.training.seed if sampled else None,  # it draws the rows that are evaluated
    }


def numbers_file(output_root: Path, key: ContentKey) -> Path:
    return output_root / FOLDER / f"{digest(key)[:DIGITS]}.json"


def stored_numbers(output_root: Path, key: ContentKey) -> TeacherNumbers | None:
    """Those that were evaluated before; None where there are none. A file that is broken, or of another key, is warned
    of and counts as none."""
    file = numbers_file(output_root, key)
    try:
        values = json.loads(file.read_bytes())
        if values["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is of another teacher, or of other rows")
        found = TeacherNumbers(**values["numbers"])
        found = replace(found, metrics=current_metrics(found.metrics))
        if not found.metrics or not all(isinstance(name, str) and "/" in name for name in found.metrics):
            raise ValueError("it holds no numbers")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning(
            "the teacher's numbers in %s cannot be used (%s: %s); it is evaluated anew",
            *(file, type(error).__name__, error),
        )
        return None
    return found


def store_numbers(output_root: Path, key: ContentKey, metrics: dict[str, Any], made_by: str) -> None:
    """For later runs: a disk on which they cannot be written is a warning."""
    file = numbers_file(output_root, key)
    numbers = asdict(TeacherNumbers(metrics, made_by, now()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"key": key, "numbers": numbers}, indent=2) + "\n")
    except OSError as error:
        logger.warning("the teacher's numbers could not be kept in %s (%s); later runs evaluate it again", file, error)
