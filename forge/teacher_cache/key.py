"""The content key: everything that a teacher's outputs depend on, by name, so that what has changed can be named."""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from forge.config.explain import effective
from forge.config.schema import Config
from forge.config.teacher_schema import WHOLE_LOGITS_COLUMNS
from forge.data.fingerprints import tokenizer_hash
from forge.model.origin import Origin
from forge.model.source import ModelSource, load_model_config
from forge.task.causal_lm.task import CausalLm
from forge.task.classification import Classification
from forge.task.ocr.line_reader import LineReader
from forge.task.ocr.task import Ocr
from forge.task.task import Task

ContentKey = dict[str, Any]  # names as messages have them, values as JSON has them

LAYERS = "distillation.hidden.layers (the teacher's)"
NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # of its config


def content_key(config: Config, task: Task, origin: Origin, dtype: str) -> ContentKey:
    """Of the teacher's outputs on every split of the task.

    task: as the student needs it. origin: of the teacher, with its hashes. dtype: that it computes in.
    """
    of_task = effective(config)["task"]
    rows = of_task.pop("dataset")
    for name in ("columns", "chat_template"):  # the rows and the template's text are parts, wherever they came from
        of_task.pop(name, None)
    told = {f"task.{name}": value for name, value in of_task.items()}
    tokenizer, own = _tokenizer(task), task.teacher_tokenizer
    parts: ContentKey = {
        "the teacher's weights": origin.weights_sha256 or f"{origin.base.location}@{origin.base.commit}",
        "the teacher's config": _hash(_config_text(origin)),
        "teacher.dtype": dtype,
        "the tokenizer": _hash(f"{tokenizer_hash(tokenizer)} {tokenizer.padding_side}"),
        "the teacher's tokenizer": (
            _hash(f"{tokenizer_hash(own)} {own.padding_side}") if own is not None else "the student's"
        ),
        "the rows, or their tokens": _hash(f"{task.fingerprint} {_tokens(task)}"),
        "task.dataset.max_rows": rows.get("max_rows"),
    }
    if isinstance(task, CausalLm) and task.encoder.template is not None:
        parts["the chat template"] = _hash(task.encoder.template.text)
    if isinstance(task, Ocr):
        parts["the image processor"] = _hash(task.processing.image_processor.to_json_string())
        if isinstance(task.reader, LineReader):
            parts["the token that a transcript begins after"] = task.reader.start
    return {**parts, **told}


def cache_key(config: Config, task: Task, origin: Origin, dtype: str, layers: tuple[int, ...]) -> ContentKey:
    """Of the cache of those outputs: also what is kept of them. layers: whose hidden states are."""
    key = content_key(config, task, origin, dtype)
    key.pop("task.num_beams", None)  # how a student writes; a teacher's outputs are those at the labels
    if isinstance(task, Classification):
        key["teacher.labels"] = config.teacher.labels
    if keeps_whole_logits(task):
        key["what is kept"] = "whole logits"
    else:
        kept = {"teacher.top_k": config.teacher.top_k, "distillation.temperature": config.distillation.temperature}
        key |= {"what is kept": "top k", **kept}
    return {**key, LAYERS: list(layers)}


def keeps_whole_logits(task: Task) -> bool:
    """Are so few labels to choose from that all logits are kept? A language model's loss takes a top k anyway."""
    if isinstance(task, Classification):
        return len(task.labels) <= WHOLE_LOGITS_COLUMNS
    return not task.has_language_head and token_columns(task) <= WHOLE_LOGITS_COLUMNS


def token_columns(task: Task) -> int:
    """Columns of a head that are tokens; what is behind them is padding, and students may have less of it.

    Ids may have gaps: the highest counts, and not their number.
    """
    return max(_tokenizer(task).get_vocab().values()) + 1


def _config_text(origin: Origin) -> str:
    """The model's config as JSON: heads, activations, scales and labels make other outputs of the same weights. Not how
    it was loaded: names, versions and dtypes."""
    source = ModelSource(origin.base.name, origin.base.location, origin.base.revision, origin.adapters)
    told = load_model_config(source, "teacher.path").to_diff_dict()
    return json.dumps(_without(told, NO_PART_OF_A_MODEL), sort_keys=True, default=str)


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    return {str(key): _without(inner, names) for key, inner in value.items() if key not in names}


def digest(key: ContentKey) -> str:
    """64 hexadecimal digits that name it."""
    return _hash(json.dumps(key, sort_keys=True))


def changed(old: ContentKey, new: ContentKey) -> list[str]:
    """A few words for each part that differs."""

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text if len(text) <= 24 else f"{text[:12]}…"

    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} ({short(old.get(name))} -> {short(new.get(name))})" for name in names]


def _tokenizer(task: Task) -> PreTrainedTokenizerBase:
    processing = task.processing
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tokens(task: Task) -> str:
    """SHA-256 over the numbers of all rows, whatever code made them of the texts; a stream has none yet."""
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
    """array: pyarrow's, of numbers, or of lists of them."""
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        hashed.update(np.asarray(array.value_lengths().fill_null(-1)).astype(np.int64).tobytes())
        array = array.flatten()
    hashed.update(np.asarray(array.to_numpy(zero_copy_only=False)).astype(np.int64).tobytes())
