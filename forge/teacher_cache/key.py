"""The content key: everything that a teacher's outputs depend on, by name, so that a change can be named."""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from forge.config.explain import effective
from forge.config.schema import Config
from forge.config.teacher_schema import WHOLE_LOGITS_COLUMNS
from forge.data.fingerprints import text_hash, tokenizer_hash
from forge.model.origin import Origin
from forge.model.source import ModelSource, load_model_config
from forge.task.task import Task

ContentKey = dict[str, Any]  # by the name that messages use; values are JSON values

LAYERS = "distillation.hidden.layers (the teacher's)"
NOT_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # in its config


def content_key(config: Config, task: Task, origin: Origin, dtype: str) -> ContentKey:
    """Return the key of the teacher's outputs on every split of the task.

    task is the one that the student needs, origin the teacher's with its hashes, and dtype the one that it computes in.
    """
    of_task = effective(config)["task"]
    rows = of_task.pop("dataset")
    for name in ("columns", "chat_template", "empty"):  # replaced by what they give: the rows, the template's text
        of_task.pop(name, None)
    settings = {f"task.{name}": value for name, value in of_task.items()}
    tokenizer, own = task.tokenizer, task.teacher_tokenizer
    parts: ContentKey = {
        "the teacher's weights": origin.weights_sha256 or f"{origin.base.location}@{origin.base.commit}",
        "the teacher's config": text_hash(_config_text(origin)),
        "teacher.dtype": dtype,
        "the tokenizer": text_hash(f"{tokenizer_hash(tokenizer)} {tokenizer.padding_side}"),
        "the teacher's tokenizer": (
            text_hash(f"{tokenizer_hash(own)} {own.padding_side}") if own is not None else "the student's"
        ),
        "the rows, or their tokens": text_hash(f"{task.fingerprint} {_tokens(task)}"),
        "task.dataset.max_rows": rows.get("max_rows"),
    }
    return {**parts, **task.key_parts(), **settings}


def cache_key(config: Config, task: Task, origin: Origin, dtype: str, layers: tuple[int, ...]) -> ContentKey:
    """Return the key of a cache of those outputs, with what is kept of them; layers: those whose hidden states are."""
    key = content_key(config, task, origin, dtype)
    key.pop("task.num_beams", None)  # how a student generates; a teacher's outputs are those at the labels
    if task.one_label_per_row:
        key["teacher.labels"] = config.teacher.labels
    if keeps_whole_logits(task):
        key["what is kept"] = "whole logits"
    else:
        kept = {"teacher.top_k": config.teacher.top_k, "distillation.temperature": config.distillation.temperature}
        key |= {"what is kept": "top k", **kept}
    return {**key, LAYERS: list(layers)}


def keeps_whole_logits(task: Task) -> bool:
    """True if a label has so few possible values that all logits are kept.

    A language model's loss takes a top k anyway.
    """
    return not task.has_language_head and task.logit_columns <= WHOLE_LOGITS_COLUMNS


def _config_text(origin: Origin) -> str:
    """Return the model's config as JSON, without names, versions and dtypes, which say how it was loaded.

    Heads, activations, scales and labels change the outputs of the same weights.
    """
    source = ModelSource(origin.base.name, origin.base.location, origin.base.revision, origin.adapters)
    values = load_model_config(source, "teacher.path").to_diff_dict()
    return json.dumps(_without(values, NOT_PART_OF_A_MODEL), sort_keys=True, default=str)


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    return {str(key): _without(inner, names) for key, inner in value.items() if key not in names}


def digest(key: ContentKey) -> str:
    """Return the SHA-256 of a key, in hexadecimal."""
    return text_hash(json.dumps(key, sort_keys=True))


def changed(old: ContentKey, new: ContentKey) -> list[str]:
    """Return a few words for each part that differs."""

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text if len(text) <= 24 else f"{text[:12]}…"

    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} ({short(old.get(name))} -> {short(new.get(name))})" for name in names]


def _tokens(task: Task) -> str:
    """Return the SHA-256 of all numbers in the rows, independent of the code that made them; a stream has none yet."""
    hashed = hashlib.sha256()
    for split, rows in {"train": task.train, **task.validation}.items():
        if isinstance(rows, Dataset):
            schema = rows.features.arrow_schema
            names = sorted(field.name for field in schema if _is_number(field.type))
            hashed.update(f"{split} {names} {len(rows)}".encode())
            for table in rows.select_columns(names).with_format("arrow").iter(batch_size=1000):
                for name in names:
                    _add(hashed, table[name].combine_chunks())
    return hashed.hexdigest()


def _is_number(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _add(hashed: Any, array: Any) -> None:
    """Hash a pyarrow array of numbers, or of nested lists of numbers."""
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        hashed.update(np.asarray(array.value_lengths().fill_null(-1)).astype(np.int64).tobytes())
        array = array.flatten()
    hashed.update(np.asarray(array.to_numpy(zero_copy_only=False)).astype(np.int64).tobytes())
