"""The distillation loss from logits, for heads with few classes and for models that give their logits whole."""

import torch
from torch import Tensor

from forge.losses.checks import check_labels, check_one_teacher, check_same_rows, check_settings
from forge.losses.cross_entropy import IGNORE, cross_entropy_sum
from forge.losses.given_gradients import wants_gradient, with_gradients
from forge.losses.kd_settings import Settings, plain_rows, teacher_share
from forge.losses.linear_kd import Parts
from forge.losses.linear_kd_plain import cross_entropy_rows, divergence_rows, sparse_rows, stored


def logits_kd(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    teacher_log_probs: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    missing_mass: str = "tail",
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    normalizer: Tensor | None = None,
    ignore_index: int = -100,
    rows: int | None = None,
) -> tuple[Tensor, Parts]:
    """((1 - alpha) * CE + alpha * T^2 * D(teacher || student)) / normalizer, as forge.losses.linear_kd defines it.

    student_logits: (N, V), teacher_logits: (N, Vt), in any float dtype. CE is over V columns, D over those that both
        have. The teacher is never given a gradient, and may be None where alpha is 0.
    teacher_log_probs, teacher_indices, missing_mass: a top-k teacher (N, K) in its place, as in linear_kd.
    labels: (N,) int64; positions with ignore_index count neither in CE nor in D.
    divergence, beta, skew: see linear_kd_plain.divergence_rows and kd_settings.teacher_share.
    normalizer: () on the device, None for the number of counted labels, at least 1.
    rows: how many positions are taken at a time, None for what fits 256 MiB.

    Softmaxes are float32, or float64 for float64 logits, for `rows` positions at a time. The gradient is computed in
    forward and kept in the logits' dtype (float32 for float16); backward only scales it, so there is no double
    backward. At alpha = 0 the loss is cross_entropy_sum / normalizer to the last bit, in value and gradient.

    Returns the loss, a float32 scalar (float64 for float64 logits), differentiable in student_logits, and its detached
    sums. Raises ValueError for shapes that disagree, and for a setting without a meaning.
    """
    mix = teacher_share(divergence, beta, skew)
    settings = Settings(float(alpha), float(temperature), divergence, mix, missing_mass, ignore_index=ignore_index)
    check_settings(settings)
    check_labels(labels, student_logits, "student_logits")
    counted = labels != ignore_index
    if settings.alpha == 0.0:
        total = cross_entropy_sum(student_logits, torch.where(counted, labels, IGNORE))
        ce_sum, kl_sum = total.detach(), torch.zeros_like(total)
    else:
        top = teacher_log_probs, teacher_indices
        check_one_teacher(teacher_logits is not None, *top, divergence, student_logits, "logits")
        if teacher_logits is not None:
            check_same_rows(student_logits, teacher_logits, "logits")
        teacher = tuple(None if x is None else x.detach() for x in (teacher_logits, teacher_log_probs, teacher_indices))
        wanted = wants_gradient(student_logits)
        with torch.no_grad():
            ce_sum, kl_sum, gradient = _sums_and_gradient(student_logits, teacher, labels, settings, wanted, rows)
            total = (1.0 - settings.alpha) * ce_sum + settings.alpha * settings.temperature**2 * kl_sum
        total = with_gradients(total, (student_logits, gradient))
    count = counted.sum()
    normalizer = count.clamp(min=1) if normalizer is None else normalizer
    return total / normalizer.to(total.dtype), Parts(ce_sum, kl_sum, count)


def _sums_and_gradient(
    student: Tensor,
    teacher: tuple[Tensor | None, ...],
    labels: Tensor,
    settings: Settings,
    wanted: bool,
    rows: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """CE and D summed over the counted rows, and the gradient of their weighted sum; None where it is not wanted."""
    teacher_logits, log_q, indices = teacher
    work = torch.promote_types(student.dtype, torch.float32)
    N, V = student.shape
    rows = rows or plain_rows(V, work.itemsize)
    weight = settings.alpha * settings.temperature**2
    ce_sum = student.new_zeros((), dtype=work)
    kl_sum = torch.zeros_like(ce_sum)
    gradient = student.new_empty((N, V), dtype=stored(student.dtype)) if wanted else None
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = student[part].to(work)
        counted = labels[part] != settings.ignore_index
        ce, d_logits = cross_entropy_rows(logits, torch.where(counted, labels[part], 0), wanted)
        d_logits *= 1.0 - settings.alpha
        if teacher_logits is not None:
            shared = min(V, teacher_logits.shape[1])
            kl, pull = divergence_rows(logits[:, :shared], teacher_logits[part, :shared].to(work), settings, wanted)
            if wanted:
                d_logits[:, :shared] += weight * pull
        else:
            assert log_q is not None
            assert indices is not None
            kl, pull = sparse_rows(logits, log_q[part], indices[part], settings, wanted)
            d_logits += weight * pull
        ce_sum += torch.where(counted, ce, 0.0).sum()
        kl_sum += torch.where(counted, kl, 0.0).sum()
        if gradient is not None:
            gradient[part] = torch.where(counted[:, None], d_logits, 0.0)
    return ce_sum, kl_sum, gradient
