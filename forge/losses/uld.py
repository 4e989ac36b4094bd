"""Universal logit distillation: a distance between two models whose vocabularies have nothing in common."""

import torch
from torch import Tensor

from forge.losses.checks import check_head_input, check_same_rows, check_temperature, student_dtype, teacher_dtype
from forge.losses.kd_arguments import HeadInput
from forge.losses.linear_kd_plain import head_logits, sign_of_difference, weighted
from forge.losses.products import (
    gradient_dtype,
    in_range_of,
    operand,
    product,
    restored,
    wants_gradient,
    with_gradients,
)


def linear_uld(student: HeadInput, teacher: HeadInput, *, temperature: float = 1.0, rows: int = 256) -> Tensor:
    """Return the sum over M aligned positions of sum_i |p_(i) - q_(i)|, each sorted in descending order; no factor T^2.

    Boizard et al. 2024 (arXiv 2402.12030): the Wasserstein distance of p and q where any token may stand for any other
    at the same cost. p and q are the softmaxes of the student's and the teacher's logits at temperature T on both; the
    narrower is padded with zeros. It is in [0, 2] for each position.

    With r_i the place of token i, dD / dp_i = g_i = sign(p_i - q_(r_i)), and the gradient in the student's logits is
    p (g - sum p g) / T; it is 0 where both agree (linear_kd_plain.sign_of_difference). Forward computes it and backward
    only scales it, so there is no double backward.

    Args:
        student: hidden states of the M positions, which the caller has chosen and aligned, with their head. Under
            autocast only the operands of its products are rounded; softmaxes are at least float32.
        teacher: as many positions in its own dtype, which autocast leaves alone. It gets no gradient.
        temperature: T, of both softmaxes.
        rows: how many positions have their logits in memory at a time.

    Returns a scalar, float32, or float64 for float64 inputs. Raises ValueError for shapes that disagree and for a
    temperature that is not positive.
    """
    check_head_input(student, "student")
    check_head_input(teacher, "teacher")
    check_same_rows(student.hidden, teacher.hidden, ".hidden")
    check_temperature(temperature)
    dtype, other_dtype = student_dtype(student), teacher_dtype(teacher)
    wanted = [wants_gradient(x) for x in (student.hidden, student.weight, student.bias)]
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        head, teacher_head = operand(student.weight, dtype), operand(teacher.weight, other_dtype)
        work = torch.promote_types(dtype, torch.float32)
        value = head.new_zeros((), dtype=work)
        d_hidden = torch.empty_like(student.hidden, dtype=gradient_dtype(student.hidden.dtype)) if wanted[0] else None
        d_head = head.new_zeros(head.shape, dtype=work) if wanted[1] else None
        d_bias = head.new_zeros(head.shape[0], dtype=work) if wanted[2] else None
        for start in range(0, student.hidden.shape[0], rows):
            part = slice(start, start + rows)
            hidden = operand(student.hidden[part], dtype)
            raw = product(hidden, head.T)
            logits, slope = head_logits(raw, student.bias, float(student.scale), float(student.softcap or 0.0))
            raw = product(operand(teacher.hidden[part], other_dtype), teacher_head.T)
            target, _ = head_logits(raw, teacher.bias, float(teacher.scale), float(teacher.softcap or 0.0))
            distance, d_logits = uld_rows(logits, target.to(work), float(temperature))
            value += distance.sum()
            d_logits = d_logits if slope is None else d_logits * slope
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits, factor = in_range_of(hidden.dtype, d_logits)
            if d_hidden is not None:
                d_hidden[part] = restored(product(d_logits, head), factor)
            if d_head is not None:
                d_head += restored(product(d_logits.T, hidden), factor)
        if d_head is not None:
            d_head = d_head.to(gradient_dtype(student.weight.dtype))
    of_bias = [] if student.bias is None else [(student.bias, d_bias)]
    return with_gradients(value, (student.hidden, d_hidden), (student.weight, d_head), *of_bias)


def logits_uld(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, rows: int = 256) -> Tensor:
    """Return linear_uld from logits (M, V) and (M, Vt) in any float dtype; differentiable in student.

    Softmaxes are float32 (float64 stays), `rows` positions at a time; one gradient is kept, in the logits' dtype
    (float32 for float16). Returns (), float32 or float64. Raises ValueError as linear_uld does.
    """
    check_same_rows(student, teacher)
    check_temperature(temperature)
    work = torch.promote_types(student.dtype, torch.float32)
    wanted = wants_gradient(student)
    with torch.no_grad():
        value = student.new_zeros((), dtype=work)
        gradient = torch.empty_like(student, dtype=gradient_dtype(student.dtype)) if wanted else None
        for start in range(0, student.shape[0], rows):
            part = slice(start, start + rows)
            distance, d_logits = uld_rows(student[part].to(work), teacher[part].to(work), float(temperature))
            value += distance.sum()
            if gradient is not None:
                gradient[part] = d_logits
    return with_gradients(value, (student, gradient))


def uld_rows(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return sum_i |p_(i) - q_(i)| of each row, (n,), and its gradient in the student's logits, (n, V).

    student: (n, V), teacher: (n, Vt) logits of one dtype. Equal probabilities keep the order of their columns, so the
    result is deterministic.
    """
    V, Vt = student.shape[1], teacher.shape[1]
    p = (student / temperature).softmax(-1)
    sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
    sorted_q = (teacher / temperature).softmax(-1).sort(-1, descending=True).values
    sorted_p = torch.nn.functional.pad(sorted_p, (0, max(0, Vt - V)))
    sorted_q = torch.nn.functional.pad(sorted_q, (0, max(0, V - Vt)))
    value = (sorted_p - sorted_q).abs().sum(-1)
    score = torch.empty_like(p).scatter_(1, order, sign_of_difference(sorted_p, sorted_q)[:, :V])
    pull = weighted(p, score)
    return value, (pull - p * pull.sum(-1, keepdim=True)) / temperature
