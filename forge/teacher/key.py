"""The content key: everything that a teacher's outputs depend on, by name, so that what has changed can be named."""

import hashlib
import json
from typing import Any

from forge.config.explain import effective
from forge.config.schema import Config
from forge.model.origin import Origin
from forge.task.identity import tokenizer_hash
from forge.task.task import Task

ContentKey = dict[str, Any]  # names as messages have them, values as JSON has them


def content_key(config: Config, task: Task, origin: Origin, dtype: str) -> ContentKey:
    """Of the teacher's outputs on every split of the task.

    origin: of the teacher, with its hashes. dtype: that it computes in.
    """
    of_task = effective(config)["task"]
    rows = of_task.pop("dataset")
    told = {f"task.{name}": value for name, value in of_task.items()}
    return {
        "the teacher's weights": origin.weights_sha256 or f"{origin.base.location}@{origin.base.commit}",
        "teacher.dtype": dtype,
        "the teacher's tokenizer": tokenizer_hash(task.teacher_tokenizer)
        if task.teacher_tokenizer
        else "the student's",
        "the rows, or their tokens": task.fingerprint,
        "task.dataset.max_rows": rows.get("max_rows"),
        **told,
    }


def digest(key: ContentKey) -> str:
    """64 hexadecimal digits that name it."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def changed(old: ContentKey, new: ContentKey) -> list[str]:
    """A few words for each part that differs."""

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text if len(text) <= 24 else f"{text[:12]}…"

    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} ({short(old.get(name))} -> {short(new.get(name))})" for name in names]
