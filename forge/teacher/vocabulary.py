"""Compares the teacher's tokenizer with the student's, token by token, and gives the teacher what it can read."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from forge.config.schema import Config
from forge.data.fingerprints import tokenizer_hash
from forge.errors import UsageError
from forge.model.load import processing_source
from forge.task.task import Task
from forge.teacher.placement import teacher_config

logger = logging.getLogger(__name__)

SHOWN_IDS = 3  # of those that differ
ROLES = ("bos", "eos", "unk", "sep", "cls")  # of special tokens; padding is masked, so its token does not matter
IMAGE_FACTS = ("image_mean", "image_std", "do_normalize", "rescale_factor")


def for_teacher(config: Config, task: Task) -> Task:
    """Return the task with what its teacher reads. task is the one that the student needs; its fingerprint stays.

    The teacher of a classifier may tokenise rows differently, because it gives one answer for a row. Any other teacher
    reads the student's tokens, and each must have the same id in its own tokenizer. With distillation.divergence uld
    both read their own tokens, and are compared where these end at the same place.

    Raises UsageError, which says what differs, if the tokenizers do not fit.
    """
    theirs = _teacher_tokenizer(config, task)
    difference = compare(task.tokenizer, theirs)
    if task.one_label_per_row:
        if _same_inputs(task.tokenizer, theirs):
            return task
        task = task.for_teacher(theirs)
        _check_terms(config, task, difference)
        return task
    if config.distillation.aligns_tokens:
        if difference is None:
            logger.warning(
                "distillation.divergence is uld, but the teacher's tokenizer is the student's: any other divergence "
                "would compare them token by token"
            )
        return task.for_teacher(theirs)
    if difference is not None:
        raise UsageError(f"the teacher's tokenizer is not the student's: {difference}; {_way_out(config, task)}")
    for notice in _notices(task.tokenizer, theirs):
        logger.warning("%s", notice)
    return task


def compare(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """Return what differs between two vocabularies, in one clause; None if each token has the same id in both."""
    ours, theirs = _by_id(student), _by_id(teacher)
    if ours == theirs:
        return None
    shared = sorted(ours.keys() & theirs.keys())
    other = [i for i in shared if ours[i] != theirs[i]]
    parts = []
    if other:
        shown = ", ".join(
            f"{i} is {ours[i]!r} for the student and {theirs[i]!r} for the teacher" for i in other[:SHOWN_IDS]
        )
        more = ", …" if len(other) > SHOWN_IDS else ""
        parts.append(f"{len(other)} of {len(shared)} common ids are different tokens ({shown}{more})")
    for more_of, fewer, whose in ((ours, theirs, "the student's"), (theirs, ours, "the teacher's")):
        if alone := sorted(more_of.keys() - fewer.keys()):
            shown = ", ".join(f"{i} is {more_of[i]!r}" for i in alone[:SHOWN_IDS])
            more = ", …" if len(alone) > SHOWN_IDS else ""
            ids = "1 id exists" if len(alone) == 1 else f"{len(alone)} ids exist"
            parts.append(f"{ids} only in {whose} ({shown}{more})")
    return f"{' and '.join(parts)}; the student's has {len(ours)} tokens and the teacher's {len(theirs)}"


def warn_of_columns(student: PreTrainedModel, teacher: PreTrainedModel, task: Task) -> None:
    """Log one warning if the heads of two language models of the same tokens have different widths."""
    if task.teacher_tokenizer is not None or task.one_label_per_row:
        return
    ours, theirs = _columns(student), _columns(teacher)
    if ours is None or theirs is None or ours == theirs:
        return
    logger.warning(
        "the student's head has %d columns and the teacher's %d, for the same %d tokens: the first %d are compared, "
        "and the rest is taken for padding",
        *(ours, theirs, len(task.tokenizer), min(ours, theirs)),
    )


def _teacher_tokenizer(config: Config, task: Task) -> PreTrainedTokenizerBase:
    source, key = processing_source(teacher_config(config), "teacher")
    try:
        processing = task.load_processing(source, key)
    except UsageError as error:
        if config.teacher.tokenizer is None and not source.is_local:  # as far as is known, the whole teacher is missing
            raise
        way_out = "name another" if config.teacher.tokenizer else "name one with teacher.tokenizer"
        raise UsageError(f"{error}; the teacher's tokens are compared with the student's: {way_out}") from error
    if isinstance(processing, ProcessorMixin):
        _warn_of_images(task.processing, processing)
        return processing.tokenizer  # type: ignore[no-any-return]
    tokenizer_hash(processing)  # raises for a slow one
    return processing


def _check_terms(config: Config, task: Task, difference: str | None) -> None:
    """Raise UsageError for terms of the loss that need both models to read the same tokens."""
    distillation = config.distillation
    if task.same_tokens or distillation.alpha == 0:
        return
    for term in ("hidden", "relations"):
        if getattr(distillation, term) is not None:
            raise UsageError(
                f"distillation.{term} compares token by token, but the teacher's tokenizer tokenises rows differently "
                f"({difference or 'the same vocabulary, used in another way'}); remove it, or name a teacher with the "
                "student's tokenizer"
            )


def _way_out(config: Config, task: Task) -> str:
    uld = ", or distillation.divergence: uld, which needs no common tokens" if task.aligns_labels else ""
    if config.model.config is not None:
        return f"start the student with the teacher's (model.tokenizer: {config.teacher.path}){uld}"
    return f"name a teacher with the student's tokenizer{uld}"


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _same_inputs(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """True if both make the same inputs of any text."""
    return (
        tokenizer_hash(student) == tokenizer_hash(teacher)
        and student.model_input_names == teacher.model_input_names
        and student.truncation_side == teacher.truncation_side
    )


def _notices(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    """Return warnings about two tokenizers with the same vocabulary."""
    notices = []
    roles = [role for role in ROLES if getattr(student, f"{role}_token") != getattr(teacher, f"{role}_token")]
    if roles:
        shown = ", ".join(
            f"{role} is {getattr(student, f'{role}_token')!r} for the student and "
            f"{getattr(teacher, f'{role}_token')!r} for the teacher"
            for role in roles
        )
        notices.append(
            f"the teacher's tokenizer has other special tokens ({shown}); each token has the same id, and the teacher "
            "reads the student's rows unchanged"
        )
    parts = [name for name, same in _parts(student, teacher).items() if not same]
    if parts:
        notices.append(
            f"the teacher's tokenizer has the student's tokens but another {' and another '.join(parts)}: it would "
            "tokenise some texts differently, but reads the student's tokens"
        )
    return notices


def _parts(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return, by name, whether the parts of two fast tokenizers other than their vocabulary are equal."""
    one, other = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (student, teacher))
    names = {"normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer", "post_processor": "post-processor"}
    same = {words: one[name] == other[name] for name, words in names.items()}
    return {**same, "segmentation": _segmentation(one["model"]) == _segmentation(other["model"])}


def _segmentation(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a tokenizer's model has besides its vocabulary, such as the merges of BPE."""
    return {name: value for name, value in model.items() if name != "vocab"}


def _columns(model: PreTrainedModel) -> int | None:
    head = model.get_output_embeddings()
    return None if head is None else int(head.weight.shape[0])


def _warn_of_images(student: Any, teacher: Any) -> None:
    """Log one warning if the processors of the two models prepare images differently."""
    ours, theirs = (getattr(processing, "image_processor", None) for processing in (student, teacher))
    values = {name: (getattr(ours, name, None), getattr(theirs, name, None)) for name in IMAGE_FACTS}
    other = [
        f"{name} is {_plain(one)} for the student and {_plain(two)} for the teacher"
        for name, (one, two) in values.items()
        if one != two
    ]
    if other:
        logger.warning(
            "the teacher reads images as they are prepared for the student, but its own processor would prepare them "
            "differently (%s): check the teacher's metrics before you trust it",
            ", ".join(other),
        )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
