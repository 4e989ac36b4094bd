"""The checks of the losses' arguments; each raises ValueError with one sentence."""

import math

import torch
from torch import Tensor

from forge.losses.kd_arguments import Computing, Formula, HeadInput, TopK
from forge.losses.kd_settings import DIVERGENCES, MISSING_MASS, PRECISIONS


def check_formula(formula: Formula) -> None:
    """Refuse a number or a word that has no meaning in the formula."""
    if not 0.0 <= formula.alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {formula.alpha}.")
    check_temperature(formula.temperature)
    if formula.divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {formula.divergence!r}.")
    if formula.divergence == "jsd" and not 0.0 < formula.beta < 1.0:
        raise ValueError(
            f"beta of jsd must be in (0, 1), got {formula.beta}; its limits are called forward_kl and reverse_kl."
        )
    if formula.divergence in ("skew_kl", "skew_reverse_kl") and not 0.0 <= formula.skew < 1.0:
        raise ValueError(f"skew of {formula.divergence} must be in [0, 1), got {formula.skew}.")
    if formula.missing_mass not in MISSING_MASS:
        raise ValueError(f"missing_mass must be one of {', '.join(MISSING_MASS)}, got {formula.missing_mass!r}.")


def check_temperature(temperature: float) -> None:
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a positive number, got {temperature}.")


def check_computing(computing: Computing) -> None:
    if computing.precision is not None and computing.precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} or None, got {computing.precision!r}.")


def check_head_input(given: HeadInput, whose: str) -> None:
    """Refuse tensors of other shapes than HeadInput names, a negative softcap and a scale that is not finite."""
    hidden, weight, bias = given.hidden, given.weight, given.bias
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{whose}.hidden {tuple(hidden.shape)} and {whose}.weight {tuple(weight.shape)} must be (N, D) and (V, D)."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{whose}.bias {tuple(bias.shape)} must have one element for each of {weight.shape[0]} columns."
        )
    if given.softcap is not None and not given.softcap >= 0.0:
        raise ValueError(f"{whose}.softcap must be a positive number or None, got {given.softcap}.")
    if not math.isfinite(given.scale):
        raise ValueError(f"{whose}.scale must be a finite number, got {given.scale}.")


def check_labels(labels: Tensor, rows: Tensor, name: str) -> None:
    """Refuse labels that are not (N,) int64 for rows (N, ...), which the caller calls `name`."""
    if rows.dim() != 2 or labels.shape != rows.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype} must be int64 with one label for each row of {name} "
            f"{tuple(rows.shape)}."
        )


def check_same_rows(student: Tensor, teacher: Tensor, part: str = "") -> None:
    """Refuse matrices with different numbers of rows. part: of the two arguments, such as `.hidden`."""
    if student.dim() != 2 or teacher.dim() != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"teacher{part} {tuple(teacher.shape)} must be a matrix with one row for each row of student{part} "
            f"{tuple(student.shape)}."
        )


def check_top_k(top: TopK, rows: int, divergence: str) -> None:
    """Refuse a top k of other shapes than (rows, K) with int64 indices, and a divergence that needs all columns."""
    log_probs, indices = top.log_probs, top.indices
    if log_probs.dim() != 2 or log_probs.shape != indices.shape:
        raise ValueError(
            f"teacher.log_probs {tuple(log_probs.shape)} and teacher.indices {tuple(indices.shape)} must have one "
            "shape (N, K)."
        )
    if log_probs.shape[0] != rows or log_probs.shape[1] == 0 or indices.dtype != torch.int64:
        raise ValueError(
            f"teacher.log_probs {tuple(log_probs.shape)} and teacher.indices {indices.dtype} need one row for each of "
            f"the student's {rows} rows, at least one column, and int64 indices."
        )
    if divergence != "forward_kl":
        raise ValueError(f"A top-k teacher supports forward_kl only, got divergence {divergence!r}.")


def check_mask(mask: Tensor, vectors: Tensor) -> None:
    """Refuse a mask that is not (B, T) bool for vectors (B, T, D)."""
    if mask.shape != vectors.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must be bool {tuple(vectors.shape[:2])}.")


def student_dtype(student: HeadInput) -> torch.dtype:
    """Return the dtype that the student's product is computed in: autocast's where it is on, else its own."""
    device = student.hidden.device.type
    if torch.is_autocast_enabled(device) and student.hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return _own_dtype(student, "student", "cast one, or use autocast")


def teacher_dtype(teacher: HeadInput) -> torch.dtype:
    """Return the dtype that the teacher's product is computed in: its own, since autocast is about training."""
    return _own_dtype(teacher, "teacher", "cast one")


def _own_dtype(given: HeadInput, whose: str, remedy: str) -> torch.dtype:
    if given.hidden.dtype != given.weight.dtype:
        raise ValueError(
            f"{whose}.hidden is {given.hidden.dtype} but {whose}.weight is {given.weight.dtype}: {remedy}."
        )
    return given.hidden.dtype
