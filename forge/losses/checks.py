"""What the losses ask of their arguments: each check raises ValueError, one sentence, for what makes no sense."""

import math

import torch
from torch import Tensor

from forge.losses.kd_settings import DIVERGENCES, MISSING_MASS, PRECISIONS, Settings


def check_settings(settings: Settings) -> None:
    """For a number or a word that gives the formula no meaning."""
    if not 0.0 <= settings.alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], and it is {settings.alpha}.")
    check_temperature(settings.temperature)
    if settings.divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, and it is {settings.divergence!r}.")
    if settings.divergence == "jsd" and not 0.0 < settings.mix < 1.0:
        raise ValueError(
            f"beta of jsd must lie strictly between 0 and 1, and it is {settings.mix}; "
            "the limits are called forward_kl and reverse_kl."
        )
    if settings.divergence == "skew_kl" and not 0.0 <= settings.mix < 1.0:
        raise ValueError(f"skew of skew_kl must lie in [0, 1), and it is {settings.mix}.")
    if settings.divergence == "skew_reverse_kl" and not 0.0 < settings.mix <= 1.0:
        raise ValueError(f"skew of skew_reverse_kl must lie in [0, 1), and it is {1.0 - settings.mix:g}.")
    if settings.missing_mass not in MISSING_MASS:
        raise ValueError(f"missing_mass must be one of {', '.join(MISSING_MASS)}, and it is {settings.missing_mass!r}.")
    if settings.softcap < 0.0 or settings.teacher_softcap < 0.0:
        raise ValueError("A softcap must be positive, or None for none.")
    if not (math.isfinite(settings.logit_scale) and math.isfinite(settings.teacher_logit_scale)):
        raise ValueError("A logit scale must be a finite number.")


def check_temperature(temperature: float) -> None:
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a positive number, and it is {temperature}.")


def check_precision(precision: str | None) -> None:
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} or None, and it is {precision!r}.")


def check_head(hidden: Tensor | None, head: Tensor | None, bias: Tensor | None, whose: str) -> None:
    """Unless hidden is (N, H), head (V, H) and bias None or (V,)."""
    shapes = [None if x is None else tuple(x.shape) for x in (hidden, head)]
    if hidden is None or head is None or hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{whose}_hidden {shapes[0]} and {whose}_head {shapes[1]} must both be given, as (N, H) and (V, H)."
        )
    if bias is not None and tuple(bias.shape) != (head.shape[0],):
        raise ValueError(f"{whose}_bias {tuple(bias.shape)} must have one element for each of {head.shape[0]} columns.")


def check_labels(labels: Tensor, rows: Tensor, beside: str) -> None:
    """Unless labels is (N,) int64 for rows (N, ...), which the caller calls `beside`."""
    if rows.dim() != 2 or labels.shape != rows.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype} must be int64 with one label for each row of {beside} "
            f"{tuple(rows.shape)}."
        )


def check_same_rows(student: Tensor, teacher: Tensor, what: str) -> None:
    """Unless both are matrices with as many rows. what: hidden or logits."""
    if student.dim() != 2 or teacher.dim() != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"teacher_{what} {tuple(teacher.shape)} must be a matrix with one row for each of those of student_{what} "
            f"{tuple(student.shape)}."
        )


def check_one_teacher(
    dense: bool, log_probs: Tensor | None, indices: Tensor | None, divergence: str, student: Tensor, what: str
) -> None:
    """Unless there is exactly one teacher; and of a top k, unless log_probs and indices are (N, K) for forward_kl.

    dense: are there hidden states, or logits? student: (N, ...); what: hidden or logits, as the caller calls it.
    """
    sparse = log_probs is not None or indices is not None
    if dense == sparse:
        given = "teacher_hidden and teacher_head" if what == "hidden" else f"teacher_{what}"
        raise ValueError(f"alpha > 0 needs one teacher: {given}, or teacher_log_probs and teacher_indices.")
    if not sparse:
        return
    if log_probs is None or indices is None or log_probs.dim() != 2 or log_probs.shape != indices.shape:
        raise ValueError("teacher_log_probs and teacher_indices must both be given, with one shape (N, K).")
    if log_probs.shape[0] != student.shape[0] or log_probs.shape[1] == 0 or indices.dtype != torch.int64:
        raise ValueError(
            f"teacher_log_probs {tuple(log_probs.shape)} and int64 teacher_indices need one row for each of the "
            f"{student.shape[0]} rows of student_{what}, and at least one column."
        )
    if divergence != "forward_kl":
        raise ValueError(f"A top-k teacher knows forward_kl only, and divergence is {divergence!r}.")


def check_mask(mask: Tensor, vectors: Tensor) -> None:
    """Unless mask is (B, T) bool for vectors (B, T, D)."""
    if mask.shape != vectors.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must be bool {tuple(vectors.shape[:2])}.")


def product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """The dtype that the student's hidden and head are multiplied in: autocast's where it is on, else their own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return own_dtype(hidden, head, "student")


def own_dtype(hidden: Tensor, head: Tensor, whose: str) -> torch.dtype:
    """The dtype that hidden and head have. A teacher is multiplied in its own: autocast is the student's training."""
    if hidden.dtype != head.dtype:
        way_out = "cast one, or autocast" if whose == "student" else "cast one"
        raise ValueError(f"{whose}_hidden is {hidden.dtype} and {whose}_head is {head.dtype}: {way_out}.")
    return hidden.dtype
