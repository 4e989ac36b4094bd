"""Calls the distillation losses with their arguments side by side, as most tests have them in one dictionary."""

from typing import Any

from torch import Tensor

from forge.losses.kd_arguments import Computing, Formula, HeadInput, KDLoss, TopK
from forge.losses.linear_kd import linear_kd
from forge.losses.logits_kd import logits_kd
from forge.losses.uld import linear_uld

FORMULA = ("alpha", "temperature", "divergence", "beta", "skew", "missing_mass", "ignore_index")
COMPUTING = ("precision", "memory_budget", "low_memory", "chunks", "compact")


def flat_linear_kd(
    student_hidden: Tensor, student_head: Tensor, labels: Tensor, *, normalizer: Tensor | None = None, **others: Any
) -> tuple[Tensor, KDLoss]:
    """Return the loss, its mean or its sum over normalizer, and all that linear_kd returns.

    others: teacher_hidden, teacher_head, teacher_bias or teacher_log_probs, teacher_indices; student_bias, logit_scale,
    softcap, teacher_logit_scale, teacher_softcap; fields of Formula and Computing.
    """
    student = HeadInput(student_hidden, student_head, *_rest_of_head(others, "student", ""))
    teacher: HeadInput | TopK | None = _top_k(others)
    of_head = others.pop("teacher_hidden", None), others.pop("teacher_head", None)
    rest = _rest_of_head(others, "teacher", "teacher_")
    if of_head[0] is not None:
        teacher = HeadInput(*of_head, *rest)
    formula, computing = Formula(**_taken(others, FORMULA)), Computing(**_taken(others, COMPUTING))
    assert not others
    return _divided(linear_kd(student, teacher, labels, formula, computing), normalizer)


def flat_logits_kd(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    rows: int | None = None,
    normalizer: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, KDLoss]:
    """Return the same of logits_kd; others: teacher_log_probs, teacher_indices and fields of Formula."""
    top = _top_k(others)
    formula = Formula(**_taken(others, FORMULA))
    assert not others
    return _divided(logits_kd(student, top if teacher is None else teacher, labels, formula, rows=rows), normalizer)


def flat_linear_uld(**others: Any) -> Tensor:
    """Return linear_uld of student_hidden, student_head, student_bias, logit_scale, softcap and the teacher's."""
    student, teacher = (
        HeadInput(others.pop(f"{whose}_hidden"), others.pop(f"{whose}_head"), *_rest_of_head(others, whose, prefix))
        for whose, prefix in (("student", ""), ("teacher", "teacher_"))
    )
    return linear_uld(student, teacher, **others)


def _rest_of_head(others: dict[str, Any], whose: str, prefix: str) -> tuple[Tensor | None, float, float | None]:
    scale, softcap = others.pop(f"{prefix}logit_scale", 1.0), others.pop(f"{prefix}softcap", None)
    return others.pop(f"{whose}_bias", None), scale, softcap


def _top_k(others: dict[str, Any]) -> TopK | None:
    log_probs, indices = others.pop("teacher_log_probs", None), others.pop("teacher_indices", None)
    return None if log_probs is None else TopK(log_probs, indices)


def _taken(others: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: others.pop(name) for name in names if name in others}


def _divided(kd: KDLoss, normalizer: Tensor | None) -> tuple[Tensor, KDLoss]:
    return (kd.loss_mean if normalizer is None else kd.loss_sum / normalizer.to(kd.loss_sum.dtype)), kd
