"""Compares the teacher's tokenizer with the student's, token by token, and gives the teacher what it can read."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forge.config.schema import Config
from forge.config.task_schema import OcrTask
from forge.data.fingerprints import tokenizer_hash
from forge.errors import UsageError
from forge.model.load import processing_source
from forge.model.source import load_processor, load_tokenizer
from forge.task.classification import Classification
from forge.task.task import Task
from forge.teacher.placement import teacher_config

logger = logging.getLogger(__name__)

SHOWN_IDS = 3  # of those that differ
ROLES = ("bos", "eos", "unk", "sep", "cls")  # of special tokens; what a row is padded with is masked
IMAGE_FACTS = ("image_mean", "image_std", "do_normalize", "rescale_factor")


def for_teacher(config: Config, task: Task) -> Task:
    """The task with what its teacher reads. task: as the student needs it; its fingerprint stays.

    A classifier's teacher may cut its rows into tokens of its own, for its answer is one for each row. Any other
    teacher reads the student's tokens, each of which must have the same id in its own tokenizer; with
    distillation.divergence uld both read their own, and are compared where these end together.

    Raises UsageError where the tokenizers do not fit, saying what differs.
    """
    theirs = _teacher_tokenizer(config, task)
    difference = compare(task.tokenizer, theirs)
    distillation = config.distillation
    if isinstance(task, Classification):
        if _same_way(task.tokenizer, theirs):
            return task
        task = task.for_teacher(theirs)
        term = next((name for name in ("hidden", "relations") if getattr(distillation, name) is not None), None)
        if not task.same_tokens and distillation.alpha > 0 and term is not None:
            raise UsageError(
                f"distillation.{term} compares token by token, and the teacher's tokenizer cuts rows into other "
                f"tokens ({difference or 'the same vocabulary, used in another way'}); take it out, or name a teacher "
                "with the student's tokenizer"
            )
        return task
    if distillation.aligns_tokens:
        if difference is None:
            logger.warning(
                "distillation.divergence is uld, and the teacher's tokenizer is the student's: any other divergence "
                "compares them token by token"
            )
        return task.for_teacher(theirs)
    if difference is not None:
        raise UsageError(f"the teacher's tokenizer is not the student's: {difference}; {_way_out(config, task)}")
    for notice in _notices(task.tokenizer, theirs):
        logger.warning("%s", notice)
    return task


def compare(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """What differs between two vocabularies, in one clause; None where each token has the same id in both."""
    ours, theirs = _by_id(student), _by_id(teacher)
    if ours == theirs:
        return None
    shared = sorted(ours.keys() & theirs.keys())
    other = [i for i in shared if ours[i] != theirs[i]]
    parts = []
    if other:
        shown = ", ".join(f"{i} is {ours[i]!r} here and {theirs[i]!r} there" for i in other[:SHOWN_IDS])
        more = ", …" if len(other) > SHOWN_IDS else ""
        parts.append(f"{len(other)} of {len(shared)} ids stand for another token ({shown}{more})")
    for more_of, fewer, whose in ((ours, theirs, "the student's"), (theirs, ours, "the teacher's")):
        if alone := sorted(more_of.keys() - fewer.keys()):
            shown = ", ".join(f"{i} is {more_of[i]!r}" for i in alone[:SHOWN_IDS])
            more = ", …" if len(alone) > SHOWN_IDS else ""
            parts.append(f"{whose} alone has {len(alone)} {'id' if len(alone) == 1 else 'ids'} ({shown}{more})")
    return f"{' and '.join(parts)}; the student's has {len(ours)} tokens and the teacher's {len(theirs)}"


def tell_of_columns(student: PreTrainedModel, teacher: PreTrainedModel, task: Task) -> None:
    """One line where the two heads of a language model differ in width, or have more columns than there are tokens."""
    if task.teacher_tokenizer is not None or isinstance(task, Classification):
        return
    ours, theirs = _columns(student), _columns(teacher)
    if ours is None or theirs is None or ours == theirs:
        return
    logger.warning(
        "the student's head has %d columns and the teacher's %d, for the same %d tokens: they are compared over the "
        "%d that both have, the rest being padding",
        *(ours, theirs, len(task.tokenizer), min(ours, theirs)),
    )


def _teacher_tokenizer(config: Config, task: Task) -> PreTrainedTokenizerBase:
    source, key = processing_source(teacher_config(config), "teacher")
    try:
        if isinstance(config.task, OcrTask):
            processor: Any = load_processor(source, key)
            _tell_of_images(task, processor)
            return processor.tokenizer
        tokenizer = load_tokenizer(source, key)
    except UsageError as error:
        if config.teacher.tokenizer is None and not source.is_local:  # the whole teacher is missing, as far as we see
            raise
        way_out = "name another" if config.teacher.tokenizer else "name one with teacher.tokenizer"
        raise UsageError(f"{error}; the teacher's tokens are compared with the student's: {way_out}") from error
    tokenizer_hash(tokenizer)  # raises for a slow one
    return tokenizer


def _way_out(config: Config, task: Task) -> str:
    uld = ", or distillation.divergence: uld, which needs no common tokens" if task.name == "causal_lm" else ""
    if config.model.config is not None:
        return f"start the student with the teacher's (model.tokenizer: {config.teacher.path}){uld}"
    return f"name a teacher with the student's tokenizer{uld}"


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _same_way(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Do both make the same inputs of any text?"""
    return (
        tokenizer_hash(student) == tokenizer_hash(teacher)
        and student.model_input_names == teacher.model_input_names
        and student.truncation_side == teacher.truncation_side
    )


def _notices(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    """What is worth a line about two tokenizers with one vocabulary."""
    notices = []
    roles = [role for role in ROLES if getattr(student, f"{role}_token") != getattr(teacher, f"{role}_token")]
    if roles:
        shown = ", ".join(
            f"{role} is {getattr(student, f'{role}_token')!r} here and {getattr(teacher, f'{role}_token')!r} there"
            for role in roles
        )
        notices.append(
            f"the teacher's tokenizer names other special tokens ({shown}); each token has the same id, and the "
            "teacher reads the student's rows as they are"
        )
    parts = [name for name, same in _parts(student, teacher).items() if not same]
    if parts:
        notices.append(
            f"the teacher's tokenizer has the student's tokens and another {' and another '.join(parts)}: it would cut "
            "some texts otherwise, and reads them as the student's tokens"
        )
    return notices


def _parts(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[str, bool]:
    """The parts of a fast tokenizer beside its vocabulary, by name: are both the same?"""
    one, other = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (student, teacher))
    names = {"normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer", "post_processor": "post-processor"}
    same = {words: one[name] == other[name] for name, words in names.items()}
    return {**same, "segmentation": _beside_vocabulary(one["model"]) == _beside_vocabulary(other["model"])}


def _beside_vocabulary(model: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name != "vocab"}  # BPE's merges, say


def _columns(model: PreTrainedModel) -> int | None:
    head = model.get_output_embeddings()
    return None if head is None else int(head.weight.shape[0])


def _tell_of_images(task: Task, processor: Any) -> None:
    ours, theirs = (getattr(item, "image_processor", None) for item in (task.processing, processor))
    values = {name: (getattr(ours, name, None), getattr(theirs, name, None)) for name in IMAGE_FACTS}
    other = [
        f"{name} is {_plain(one)} here and {_plain(two)} there" for name, (one, two) in values.items() if one != two
    ]
    if other:
        logger.warning(
            "the teacher reads images as they are prepared for the student, and its own processor prepares them "
            "otherwise (%s): look at its numbers before you trust it",
            ", ".join(other),
        )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
