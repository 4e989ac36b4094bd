"""The chunked loss in plain torch: the path on a CPU, and the twin that tests compare the kernels with."""

import math

import torch
from torch import Tensor

from forge.losses.kd_settings import EQUAL, TAIL_FLOOR, Inputs, Needs, Outputs, Settings
from forge.losses.products import gradient_dtype


def plain_linear_kd(inputs: Inputs, settings: Settings, needs: Needs, rows: int) -> Outputs:
    """Return the sums and gradients of forge.losses.linear_kd, computed `rows` rows at a time, on any device.

    Logits are float32, or float64 for float64 inputs, whatever the inputs are rounded to.
    """
    N = inputs.hidden.shape[0]
    work = torch.promote_types(inputs.dtype, torch.float32)
    head = inputs.head.to(inputs.dtype).to(work)  # (V, Hs)
    teacher_head = None  # (shared, Ht)
    if inputs.teacher_head is not None:
        teacher_head = inputs.teacher_head[: inputs.shared].to(inputs.teacher_dtype).to(work)
    ce_sum = head.new_zeros(())
    kl_sum = head.new_zeros(())
    d_hidden = inputs.hidden.new_zeros(inputs.hidden.shape if needs.hidden else 0)
    d_head = head.new_zeros(head.shape if needs.head else 0)
    d_bias = head.new_zeros(head.shape[0] if needs.bias else 0)

    for start in range(0, N, rows):
        part = slice(start, start + rows)
        hidden = inputs.hidden[part].to(inputs.dtype).to(work)
        logits, slope = head_logits(hidden @ head.T, inputs.bias, settings.logit_scale, settings.softcap)
        counted = inputs.labels[part] != settings.ignore_index
        ce, gradient = cross_entropy_rows(logits, torch.where(counted, inputs.labels[part], 0), needs.any)
        gradient *= 1.0 - settings.alpha
        if settings.alpha > 0.0:
            if teacher_head is not None:
                assert inputs.teacher_hidden is not None
                teacher_hidden = inputs.teacher_hidden[part].to(inputs.teacher_dtype).to(work)
                bias = None if inputs.teacher_bias is None else inputs.teacher_bias[: inputs.shared]
                raw = teacher_hidden @ teacher_head.T
                teacher, _ = head_logits(raw, bias, settings.teacher_logit_scale, settings.teacher_softcap)
                kl, d_logits = divergence_rows(logits[:, : inputs.shared], teacher, settings, needs.any)
                if needs.any:
                    gradient[:, : inputs.shared] += settings.alpha * settings.temperature**2 * d_logits
            else:
                assert inputs.top_log_probs is not None
                assert inputs.top_indices is not None
                top = inputs.top_log_probs[part], inputs.top_indices[part]
                kl, d_logits = sparse_rows(logits, *top, settings, needs.any)
                gradient += settings.alpha * settings.temperature**2 * d_logits
            kl_sum += torch.where(counted, kl, 0.0).sum()
        ce_sum += torch.where(counted, ce, 0.0).sum()
        if not needs.any:
            continue
        gradient = torch.where(counted[:, None], gradient if slope is None else gradient * slope, 0.0)
        if needs.hidden:
            d_hidden[part] = gradient @ head
        if needs.head:
            d_head += gradient.T @ hidden
        if needs.bias:
            d_bias += gradient.sum(0)

    bias_dtype = work if inputs.bias is None else inputs.bias.dtype
    return Outputs(
        ce_sum, kl_sum, d_hidden, d_head.to(gradient_dtype(inputs.head.dtype)), d_bias.to(gradient_dtype(bias_dtype))
    )


def head_logits(raw: Tensor, bias: Tensor | None, scale: float, softcap: float) -> tuple[Tensor, Tensor | float | None]:
    """Return logits softcap * tanh(scale * (raw + bias) / softcap), and the factor of their gradient on its way back.

    Softcap 0 is none. The factor is None if it is 1. The order is the models': Gemma 2 caps what its head gives, Cohere
    scales it.
    """
    logits = raw if bias is None else raw + bias.to(raw.dtype)
    if scale != 1.0:
        logits = logits * scale
    if softcap == 0.0:
        return logits, None if scale == 1.0 else scale
    tanh = torch.tanh(logits / softcap)
    return tanh * softcap, (1.0 - tanh * tanh) * scale


def cross_entropy_rows(logits: Tensor, labels: Tensor, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Return -log softmax(logits)[label] of each row, (n,), and softmax - one_hot, (n, V), or (0,) if not wanted."""
    log_p = logits.log_softmax(-1)
    labels = labels[:, None]
    if not wanted:
        return -log_p.gather(1, labels).squeeze(1), log_p.new_empty(0)
    gradient = log_p.exp().scatter_add_(1, labels, torch.full_like(log_p[:, :1], -1.0))
    return -log_p.gather(1, labels).squeeze(1), gradient


def divergence_rows(student: Tensor, teacher: Tensor, settings: Settings, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Return D(teacher || student) of each row at temperature T, without T^2, and its gradient in the student's logits.

    student, teacher: (n, V) logits. Returns (n,) and (n, V), or (0,) if no gradient is wanted. With p the student, q
    the teacher and m = w q + (1 - w) p, w being settings.mix:

        forward_kl       sum q log(q / p)                               gradient (p - q) / T
        reverse_kl       sum p log(p / q)                                p (g - sum p g) / T,  g = log(p / q)
        jsd              w sum q log(q / m) + (1 - w) sum p log(p / m)   likewise, g = (1 - w) log(p / m)
        skew_kl          sum q log(q / m)                                likewise, g = -(1 - w) q / m
        skew_reverse_kl  sum p log(p / m)                                likewise, g = log(p / m) - (1 - w) p / m
        tvd              sum |p - q| / 2                                 likewise, g = sign(p - q) / 2, 0 at equality

    jsd is the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (GKD, arXiv 2306.13649), w = beta; the two
    skew divergences are those of Ko et al. 2024 (DistiLLM, arXiv 2402.03898), w = lambda in skew_kl and 1 - lambda in
    skew_reverse_kl; tvd is the total variation distance, Wen et al. 2023 (arXiv 2307.15190).
    """
    T = settings.temperature
    log_p, log_q = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if settings.divergence == "forward_kl":
        return weighted(q, log_q - log_p).sum(-1), (p - q) / T if wanted else p.new_empty(0)
    if settings.divergence == "reverse_kl":
        score = log_p - log_q
        value = weighted(p, score).sum(-1)
    elif settings.divergence == "tvd":
        score = 0.5 * sign_of_difference(p, q)
        value = 0.5 * (p - q).abs().sum(-1)
    else:
        w = settings.mix
        log_m = log_mixture(log_p, log_q, w)
        if settings.divergence == "jsd":
            score = (1.0 - w) * (log_p - log_m)
            value = w * weighted(q, log_q - log_m).sum(-1) + weighted(p, score).sum(-1)
        elif settings.divergence == "skew_kl":
            score = -(1.0 - w) * (log_q - log_m).exp()
            value = weighted(q, log_q - log_m).sum(-1)
        else:
            score = (log_p - log_m) - (1.0 - w) * (log_p - log_m).exp()
            value = weighted(p, log_p - log_m).sum(-1)
    if not wanted:
        return value, p.new_empty(0)
    pull = weighted(p, score)
    return value, (pull - p * pull.sum(-1, keepdim=True)) / T


def log_mixture(log_p: Tensor, log_q: Tensor, w: float) -> Tensor:
    """Return log(w q + (1 - w) p), also for w of 0 and 1."""
    if w in (0.0, 1.0):
        return log_q if w else log_p
    return torch.logaddexp(log_q + math.log(w), log_p + math.log(1.0 - w))


def sign_of_difference(p: Tensor, q: Tensor) -> Tensor:
    """Return sign(p - q) of probabilities; 0 where they differ by at most the share EQUAL of the larger one."""
    difference = p - q
    return torch.where(difference.abs() > EQUAL * torch.maximum(p, q), difference.sign(), 0.0)


def sparse_rows(
    student: Tensor, log_q: Tensor, indices: Tensor, settings: Settings, wanted: bool = True
) -> tuple[Tensor, Tensor]:
    """Return forward KL of each row from the teacher's top k alone, and its gradient in the student's logits.

    student: (n, V) logits; log_q: (n, K) log-probabilities at temperature T, -inf for an absent entry; indices: (n, K),
    distinct within a row. Returns (n,) and (n, V), or (0,) if no gradient is wanted. What happens to the mass
    Q = 1 - sum q that the k entries lack depends on settings.missing_mass:

        tail         one more event, whose student probability P is that of all other tokens:  + Q log(Q / P)
        renormalise  spread over the k entries in proportion
        zero         left out: sum q log(q / p) over the k entries

    The value and the gradient of a row without any entry are 0.
    """
    T = settings.temperature
    log_p = (student / T).log_softmax(-1)
    log_q = log_q.to(log_p.dtype)
    if settings.missing_mass == "renormalise":
        log_q = log_q - log_q.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(log_q.dtype).min)
    q = log_q.exp()
    top_log_p = log_p.gather(1, indices)
    top_p = torch.where(q > 0, top_log_p.exp(), 0.0)
    value = weighted(q, log_q - top_log_p).sum(-1)
    kept, ratio = q.sum(-1, keepdim=True), torch.zeros_like(q[:, :1])
    if settings.missing_mass == "tail":
        tail = 1.0 - kept
        tail = torch.where(tail > TAIL_FLOOR, tail, 0.0)
        student_tail = (1.0 - top_p.sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR)
        value = value + torch.special.xlogy(tail, tail / student_tail).squeeze(-1)
        kept, ratio = 1.0 - tail / student_tail, tail / student_tail
    if not wanted:
        return value, log_p.new_empty(0)
    gradient = (log_p.exp() * kept).scatter_add_(1, indices, top_p * ratio - q)
    return value, gradient / T


def weighted(probability: Tensor, score: Tensor) -> Tensor:
    """Return probability * score, and 0 where the probability is 0, even if the score is infinite."""
    return torch.where(probability > 0, probability * score, 0.0)
