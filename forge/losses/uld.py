"""Universal logit distillation: a distance between two models whose vocabularies have nothing in common."""

import torch
from torch import Tensor

from forge.losses.checks import check_head, check_same_rows, check_temperature, own_dtype, product_dtype
from forge.losses.given_gradients import wants_gradient, with_gradients
from forge.losses.linear_kd_plain import head_logits, sign_of_difference, stored, weighted
from forge.losses.products import in_range_of, operand, product, restored


def linear_uld(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    rows: int = 256,
) -> Tensor:
    """The sum over M aligned positions of sum_i |p_(i) - q_(i)|, both sorted from the largest down. No factor T^2.

    Boizard et al. 2024 (arXiv 2402.12030): the Wasserstein distance of p and q where any token may stand for any other
    at the same cost. p and q are the softmaxes of the student's and the teacher's logits at temperature T on both; the
    narrower is padded with zeros. It lies in [0, 2] for each position. The caller has chosen and aligned the positions.

    student_hidden: (M, Hs), student_head: (V, Hs), student_bias: (V,); one float dtype, or under autocast any.
    teacher_hidden: (M, Ht), teacher_head: (Vt, Ht), teacher_bias: (Vt,); one float dtype, which autocast leaves alone;
        never given a gradient.
    logit_scale, softcap: logits are softcap * tanh(logit_scale * (hidden @ head.T + bias) / softcap).
    rows: how many positions have their logits in memory at a time. Softmaxes are float32 also under autocast, where
        only the operands of the student's products are rounded.

    With r_i the place of token i, dD / dp_i = g_i = sign(p_i - q_(r_i)), and the gradient in the student's logits is
    p (g - sum p g) / T; it is 0 where both sides agree (linear_kd_plain.sign_of_difference). It is computed in forward
    and only scaled in backward, so there is no double backward.

    Returns (), float32, or float64 for float64 inputs. Raises ValueError for shapes that disagree and for a
    temperature that is not positive.
    """
    check_head(student_hidden, student_head, student_bias, "student")
    check_head(teacher_hidden, teacher_head, teacher_bias, "teacher")
    check_same_rows(student_hidden, teacher_hidden, "hidden")
    check_temperature(temperature)
    dtype = product_dtype(student_hidden, student_head)
    teacher_dtype = own_dtype(teacher_hidden, teacher_head, "teacher")
    wanted = [wants_gradient(x) for x in (student_hidden, student_head, student_bias)]
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        head, wider_head = operand(student_head, dtype), operand(teacher_head, teacher_dtype)
        work = torch.promote_types(dtype, torch.float32)
        value = head.new_zeros((), dtype=work)
        d_hidden = torch.empty_like(student_hidden, dtype=stored(student_hidden.dtype)) if wanted[0] else None
        d_head = head.new_zeros(head.shape, dtype=work) if wanted[1] else None
        d_bias = head.new_zeros(head.shape[0], dtype=work) if wanted[2] else None
        for start in range(0, student_hidden.shape[0], rows):
            part = slice(start, start + rows)
            hidden = operand(student_hidden[part], dtype)
            raw = product(hidden, head.T)
            logits, slope = head_logits(raw, student_bias, float(logit_scale), float(softcap or 0.0))
            raw = product(operand(teacher_hidden[part], teacher_dtype), wider_head.T)
            teacher, _ = head_logits(raw, teacher_bias, float(teacher_logit_scale), float(teacher_softcap or 0.0))
            distance, d_logits = uld_rows(logits, teacher.to(work), float(temperature))
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
            d_head = d_head.to(stored(student_head.dtype))
    return with_gradients(value, (student_hidden, d_hidden), (student_head, d_head), *_bias_pair(student_bias, d_bias))


def logits_uld(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, rows: int = 256) -> Tensor:
    """linear_uld from logits (M, V) and (M, Vt) in any float dtype; differentiable in student_logits.

    Softmaxes are float32 (float64 stays), `rows` positions at a time; one gradient is kept, in the logits' dtype
    (float32 for float16). Returns (), float32 or float64. Raises ValueError as linear_uld does.
    """
    check_same_rows(student_logits, teacher_logits, "logits")
    check_temperature(temperature)
    work = torch.promote_types(student_logits.dtype, torch.float32)
    wanted = wants_gradient(student_logits)
    with torch.no_grad():
        value = student_logits.new_zeros((), dtype=work)
        gradient = torch.empty_like(student_logits, dtype=stored(student_logits.dtype)) if wanted else None
        for start in range(0, student_logits.shape[0], rows):
            part = slice(start, start + rows)
            logits, teacher = student_logits[part].to(work), teacher_logits[part].to(work)
            distance, d_logits = uld_rows(logits, teacher, float(temperature))
            value += distance.sum()
            if gradient is not None:
                gradient[part] = d_logits
    return with_gradients(value, (student_logits, gradient))


def uld_rows(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """sum_i |p_(i) - q_(i)| of each row, and its gradient in the student's logits: (n,) and (n, V).

    student: (n, V), teacher: (n, Vt) logits of one dtype. Equal probabilities keep the order of their columns, so the
    result depends on nothing else.
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


def _bias_pair(bias: Tensor | None, gradient: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    return [] if bias is None else [(bias, gradient)]
