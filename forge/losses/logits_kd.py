"""The distillation loss from logits, for heads with few classes and for models that give their logits whole."""

import torch
from torch import Tensor

from forge.losses.checks import check_formula, check_labels, check_same_rows, check_top_k
from forge.losses.cross_entropy import IGNORE, cross_entropy_sum
from forge.losses.kd_arguments import Formula, KDLoss, TopK
from forge.losses.kd_settings import Settings, plain_rows, teacher_share
from forge.losses.linear_kd_plain import cross_entropy_rows, divergence_rows, sparse_rows
from forge.losses.products import gradient_dtype, wants_gradient, with_gradients


def logits_kd(
    student: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor,
    formula: Formula = Formula(),  # noqa: B008 - frozen
    *,
    rows: int | None = None,
) -> KDLoss:
    """Return (1 - alpha) * CE + alpha * T^2 * D(teacher || student), summed over the rows that count, from logits.

        kd = logits_kd(logits, teacher_logits, labels, Formula(alpha=0.9, temperature=2.0))
        kd.loss_mean.backward()

    It is the loss of linear_kd where logits (N, V) exist anyway. At alpha 0 it is cross_entropy_sum to the last bit, in
    value and gradient.

    Args:
        student: (N, V) logits in any float dtype; softmaxes and sums are float32 (float64 stays), `rows` at a time.
        teacher: (N, Vt) logits, or its top k for forward_kl, or None if alpha is 0. CE is over V columns, D over those
            that both models have. It gets no gradient.
        labels: (N,) int64, already shifted; a row with formula.ignore_index counts neither in CE nor in D.
        formula: alpha, temperature and divergence; see Formula.
        rows: how many rows are computed at a time; None for as many as fit into 256 MiB.

    Returns:
        Sums over the counted rows, in nats: float32 scalars, or float64 for float64 logits. Only loss_sum has a
        gradient. Forward computes it and keeps it in the dtype of the logits (float32 for float16); backward only
        scales it, and there is no double backward. If no row counts, the sums and the gradients are 0.

    Raises:
        ValueError: shapes or dtypes disagree, or a setting has no meaning.
    """
    check_formula(formula)
    check_labels(labels, student, "student")
    counted = labels != formula.ignore_index
    count = counted.sum()
    if formula.alpha == 0.0:
        total = cross_entropy_sum(student, torch.where(counted, labels, IGNORE))
        return KDLoss(total, total.detach(), torch.zeros_like(total), count)
    _check_teacher(teacher, student, formula)
    wanted = wants_gradient(student)
    with torch.no_grad():
        ce_sum, divergence_sum, gradient = _sums_and_gradient(student, teacher, labels, formula, wanted, rows)
        alpha, T = float(formula.alpha), float(formula.temperature)
        total = (1.0 - alpha) * ce_sum + alpha * T**2 * divergence_sum
    return KDLoss(with_gradients(total, (student, gradient)), ce_sum, divergence_sum, count)


def _check_teacher(teacher: Tensor | TopK | None, student: Tensor, formula: Formula) -> None:
    if isinstance(teacher, TopK):
        check_top_k(teacher, len(student), formula.divergence)
    elif teacher is None:
        raise ValueError("alpha > 0 needs a teacher: logits or TopK, got None.")
    else:
        check_same_rows(student, teacher)


def _sums_and_gradient(
    student: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor,
    formula: Formula,
    wanted: bool,
    rows: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return CE and D summed over the counted rows, and the gradient of their weighted sum, or None if not wanted."""
    mix = teacher_share(formula.divergence, formula.beta, formula.skew)
    settings = Settings(float(formula.alpha), float(formula.temperature), formula.divergence, mix, formula.missing_mass)
    work = torch.promote_types(student.dtype, torch.float32)
    N, V = student.shape
    rows = rows or plain_rows(V, work.itemsize)
    weight = settings.alpha * settings.temperature**2
    ce_sum = student.new_zeros((), dtype=work)
    divergence_sum = torch.zeros_like(ce_sum)
    gradient = student.new_empty((N, V), dtype=gradient_dtype(student.dtype)) if wanted else None
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = student[part].to(work)
        counted = labels[part] != formula.ignore_index
        ce, d_logits = cross_entropy_rows(logits, torch.where(counted, labels[part], 0), wanted)
        d_logits *= 1.0 - settings.alpha
        if isinstance(teacher, TopK):
            divergence, pull = sparse_rows(logits, teacher.log_probs[part], teacher.indices[part], settings, wanted)
            d_logits += weight * pull
        else:
            assert teacher is not None
            shared = min(V, teacher.shape[1])
            divergence, pull = divergence_rows(logits[:, :shared], teacher[part, :shared].to(work), settings, wanted)
            if wanted:
                d_logits[:, :shared] += weight * pull
        ce_sum += torch.where(counted, ce, 0.0).sum()
        divergence_sum += torch.where(counted, divergence, 0.0).sum()
        if gradient is not None:
            gradient[part] = torch.where(counted[:, None], d_logits, 0.0)
    return ce_sum, divergence_sum, gradient
