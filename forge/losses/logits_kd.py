"""The distillation loss from logits, for heads with few classes, where there is nothing to save."""

import torch
from torch import Tensor
from torch.nn import functional

from forge.losses.kd_settings import Settings, check_settings
from forge.losses.linear_kd import Parts
from forge.losses.linear_kd_plain import divergence_rows


def logits_kd(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    normalizer: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Parts]:
    """((1 - alpha) * CE + alpha * T^2 * D(teacher || student)) / normalizer, as forge.losses.linear_kd defines it.

    student_logits, teacher_logits: (N, V) in any float dtype, computed in at least float32; the teacher is never given
    a gradient, and may be None where alpha is 0. labels: (N,) int64; normalizer: () on the device, None for the number
    of counted labels, at least 1. Returns the loss, differentiable in student_logits, and its detached sums.

    Raises ValueError for shapes that disagree, and for a setting without a meaning.
    """
    mix = float(beta) if divergence == "jsd" else float(skew) if divergence == "skew_kl" else 0.0
    settings = Settings(float(alpha), float(temperature), divergence, mix, ignore_index=ignore_index)
    check_settings(settings)
    if student_logits.dim() != 2 or labels.shape != student_logits.shape[:1]:
        raise ValueError(f"student_logits {tuple(student_logits.shape)} and labels {tuple(labels.shape)} do not agree.")
    logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    counted = labels != ignore_index
    count = counted.sum()
    ce_sum = functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    total = (1.0 - settings.alpha) * ce_sum
    kl_sum = torch.zeros_like(ce_sum)
    if settings.alpha > 0.0:
        if teacher_logits is None or teacher_logits.shape != student_logits.shape:
            raise ValueError(f"alpha > 0 needs teacher_logits of shape {tuple(student_logits.shape)}.")
        kl, _ = divergence_rows(logits, teacher_logits.detach().to(logits.dtype), settings)
        kl_sum = torch.where(counted, kl, 0.0).sum()
        total = total + settings.alpha * settings.temperature**2 * kl_sum
    normalizer = count.clamp(min=1) if normalizer is None else normalizer
    return total / normalizer.to(total.dtype), Parts(ce_sum.detach(), kl_sum.detach(), count)
