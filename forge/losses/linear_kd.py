"""The distillation loss from hidden states and heads, without the full logits of either model."""

import dataclasses
import importlib.util
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from forge.losses.checks import (
    check_head,
    check_labels,
    check_one_teacher,
    check_precision,
    check_same_rows,
    check_settings,
    own_dtype,
    product_dtype,
)
from forge.losses.kd_settings import (
    Chunks,
    Inputs,
    Needs,
    Outputs,
    Settings,
    plain_rows,
    plan_chunks,
    teacher_share,
)
from forge.losses.linear_kd_plain import plain_linear_kd, stored

logger = logging.getLogger(__name__)
SCALED_AT_ONCE = 2**22  # elements of a gradient that plain torch scales in one go, so that no wide copy of it is made


@dataclasses.dataclass
class Parts:
    """What the loss is made of: float scalars on the device, detached, summed over the counted positions."""

    ce_sum: Tensor  # () cross-entropy in nats
    kl_sum: Tensor  # () D(teacher || student) at temperature T, without T^2; 0 where alpha is 0
    count: Tensor  # () int64


def linear_kd(
    student_hidden: Tensor,
    student_head: Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    missing_mass: str = "tail",
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    normalizer: Tensor | None = None,
    ignore_index: int = -100,
    compact: bool = False,
    precision: str | None = None,
    memory_budget: int | None = None,
    low_memory: bool = False,
    chunks: Chunks | None = None,
) -> tuple[Tensor, Parts]:
    """((1 - alpha) * CE + alpha * T^2 * D(teacher || student)) / normalizer, CE and D summed over counted positions.

    CE is at temperature 1 over the student's V columns; D at temperature T over the columns that both heads have, the
    rest of the wider head being padding. The divergences are written out in linear_kd_plain.divergence_rows. The factor
    T^2 keeps the size of D's gradient (Hinton et al. 2015, arXiv 1503.02531).

    student_hidden: (N, Hs), student_head: (V, Hs), student_bias: (V,); one float dtype, or under autocast any.
    labels: (N,) int64, already shifted; positions with ignore_index count neither in CE nor in D.
    teacher_hidden: (N, Ht), teacher_head: (Vt, Ht), teacher_bias: (Vt,); one float dtype, which autocast leaves alone;
        never given a gradient.
    teacher_log_probs, teacher_indices: (N, K) instead of those, for forward_kl: the teacher's top k at this
        temperature, indices distinct within a row, -inf for an absent entry. missing_mass says what becomes of the
        probability that they lack: tail, renormalise or zero; see linear_kd_plain.sparse_rows.
    alpha: in [0, 1]. At 0 no teacher is needed, and one that is given is not touched; at 1 CE is still reported.
    divergence: forward_kl, reverse_kl, jsd (with beta), skew_kl or skew_reverse_kl (with skew), or tvd. beta in (0, 1)
        is the teacher's share of the mixture; skew in [0, 1) the share of the distribution whose log-ratio is averaged,
        the teacher's in skew_kl and the student's in skew_reverse_kl.
    logit_scale, softcap: logits are softcap * tanh(logit_scale * (hidden @ head.T + bias) / softcap).
    normalizer: () on the device, usually the labels of the whole optimizer step over all ranks and micro-batches; None
        for those of this call, at least 1.
    compact: leave ignored rows out of the products. It waits once for the device, to learn how many are left.
    precision: of the logits between product and loss, on the fused path: "difference" (float16 teacher logits and
        float16 differences), "fp32" or "bf16" (the inputs' dtype: fast, and wrong near convergence); None for the
        difference where it can run, else fp32. What cannot run falls back to fp32 with one warning.
    memory_budget, low_memory: scratch bytes and a smaller plan, see kd_settings.plan_chunks; chunks overrides both.

    Returns the loss, a float32 scalar (float64 for float64 inputs), differentiable in student_hidden, student_head and
    student_bias, and its detached Parts. Gradients are computed in forward and only scaled in backward, so there is no
    double backward. Deterministic. torch.compile sees one operator.

    Raises ValueError for shapes that disagree, and for a setting without a meaning.
    """
    settings = Settings(
        alpha=float(alpha),
        temperature=float(temperature),
        divergence=divergence,
        mix=teacher_share(divergence, beta, skew),
        missing_mass=missing_mass,
        logit_scale=float(logit_scale),
        softcap=float(softcap or 0.0),
        teacher_logit_scale=float(teacher_logit_scale),
        teacher_softcap=float(teacher_softcap or 0.0),
        ignore_index=ignore_index,
    )
    check_settings(settings)
    check_precision(precision)
    if settings.alpha == 0.0:
        teacher_hidden = teacher_head = teacher_bias = teacher_log_probs = teacher_indices = None
    check_head(student_hidden, student_head, student_bias, "student")
    check_labels(labels, student_hidden, "student_hidden")
    if settings.alpha > 0.0:
        dense = teacher_hidden is not None or teacher_head is not None
        check_one_teacher(dense, teacher_log_probs, teacher_indices, divergence, student_hidden, "hidden")
        if dense:
            check_head(teacher_hidden, teacher_head, teacher_bias, "teacher")
        if teacher_hidden is not None:
            check_same_rows(student_hidden, teacher_hidden, "hidden")
    student_dtype = product_dtype(student_hidden, student_head)
    teacher_dtype = student_dtype
    if teacher_hidden is not None and teacher_head is not None:
        teacher_dtype = own_dtype(teacher_hidden, teacher_head, "teacher")

    grad = torch.is_grad_enabled()
    total, ce_sum, kl_sum, _, _, _ = torch.ops.forge.linear_kd(
        student_hidden,
        student_head,
        labels,
        student_bias,
        None if teacher_hidden is None else teacher_hidden.detach(),
        None if teacher_head is None else teacher_head.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        None if teacher_log_probs is None else teacher_log_probs.detach(),
        teacher_indices,
        [
            settings.alpha,
            settings.temperature,
            settings.mix,
            settings.logit_scale,
            settings.softcap,
            settings.teacher_logit_scale,
            settings.teacher_softcap,
        ],
        divergence,
        missing_mass,
        ignore_index,
        student_dtype,
        teacher_dtype,
        [
            grad and student_hidden.requires_grad,
            grad and student_head.requires_grad,
            grad and student_bias is not None and student_bias.requires_grad,
        ],
        compact,
        precision,
        memory_budget,
        low_memory,
        None if chunks is None else [chunks.rows, chunks.wide],
    )
    count = (labels != ignore_index).sum()
    if normalizer is None:
        normalizer = count.clamp(min=1)
    return total / normalizer.to(total.dtype), Parts(ce_sum.detach(), kl_sum.detach(), count)


@torch.library.custom_op("forge::linear_kd", mutates_args=())
def linear_kd_operator(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    teacher_bias: Tensor | None,
    top_log_probs: Tensor | None,
    top_indices: Tensor | None,
    numbers: list[float],
    divergence: str,
    missing_mass: str,
    ignore_index: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    wanted: list[bool],
    compact: bool,
    precision: str | None,
    memory_budget: int | None,
    low_memory: bool,
    chunk_sizes: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Total, CE and D sums, and the gradients of total in hidden, head and bias: empty where not wanted."""
    alpha, temperature, mix, scale, cap, teacher_scale, teacher_cap = numbers
    settings = Settings(
        alpha, temperature, divergence, mix, missing_mass, scale, cap, teacher_scale, teacher_cap, ignore_index
    )
    teacher = (teacher_hidden, teacher_head, teacher_bias, top_log_probs, top_indices)
    inputs = Inputs(hidden, head, labels, bias, *teacher, dtype=dtype, teacher_dtype=teacher_dtype)
    chunks = None if chunk_sizes is None else Chunks(*chunk_sizes)
    # Autocast would round the float32 sums of the plain path.
    with torch.autocast(hidden.device.type, enabled=False):
        needs = Needs(*wanted)
        compute = partial(
            computed,
            settings=settings,
            needs=needs,
            precision=precision,
            memory_budget=memory_budget,
            low_memory=low_memory,
            chunks=chunks,
        )
        outputs = compacted(inputs, ignore_index, needs, compute) if compact else compute(inputs)
    total = (1.0 - alpha) * outputs.ce_sum + alpha * temperature**2 * outputs.kl_sum
    return total, outputs.ce_sum, outputs.kl_sum, outputs.d_hidden, outputs.d_head, outputs.d_bias


@linear_kd_operator.register_fake
def _(hidden, head, labels, bias, *others):  # type: ignore[no-untyped-def]
    dtype, wanted = others[-8], others[-6]
    work = torch.promote_types(dtype, torch.float32)
    total, ce_sum, kl_sum = (head.new_empty((), dtype=work) for _ in range(3))
    d_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    d_head = head.new_empty(head.shape if wanted[1] else 0, dtype=stored(head.dtype))
    d_bias = head.new_empty(head.shape[0] if wanted[2] else 0, dtype=stored(work if bias is None else bias.dtype))
    return total, ce_sum, kl_sum, d_hidden, d_head, d_bias


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, _, d_hidden, d_head, d_bias = output
    ctx.save_for_backward(d_hidden, d_head, d_bias)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype, None if inputs[3] is None else inputs[3].dtype
    ctx.wanted = inputs[15]
    ctx.set_materialize_grads(False)  # zeros for the unused outputs would be as large as the head


def _backward(ctx, d_total, *_unused):  # type: ignore[no-untyped-def]
    gradients = [
        torch.ops.forge.scaled_gradient(gradient, d_total, dtype) if wanted and d_total is not None else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return gradients[0], gradients[1], None, gradients[2], *[None] * 17


linear_kd_operator.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("forge::scaled_gradient", mutates_args=())
def scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, () on the device, rounded once to dtype; gradient stays as it was for another backward."""
    if refusal_of_kernels(gradient.device, gradient.dtype) is None:
        from forge.losses.linear_kd_triton import scaled

        with torch.cuda.device(gradient.device):
            return scaled(gradient, factor, dtype)
    work = torch.promote_types(gradient.dtype, torch.float32)
    out = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, SCALED_AT_ONCE * gradient.shape[0] // max(gradient.numel(), 1))
    for part, scaled_part in zip(gradient.split(rows), out.split(rows), strict=True):
        scaled_part.copy_(part.to(work) * factor.to(work))
    return out


@scaled_gradient.register_fake
def _(gradient, factor, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient, dtype=dtype)


def compacted(inputs: Inputs, ignore_index: int, needs: Needs, compute: Callable[[Inputs], Outputs]) -> Outputs:
    """compute on the counted rows alone; torch.nonzero waits for the device."""
    kept = torch.nonzero(inputs.labels != ignore_index).squeeze(1)

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[kept]

    fewer = dataclasses.replace(
        inputs,
        hidden=inputs.hidden[kept],
        labels=inputs.labels[kept],
        teacher_hidden=rows(inputs.teacher_hidden),
        top_log_probs=rows(inputs.top_log_probs),
        top_indices=rows(inputs.top_indices),
    )
    outputs = compute(fewer)
    if not needs.hidden:
        return outputs
    d_hidden = torch.zeros_like(inputs.hidden)
    d_hidden[kept] = outputs.d_hidden
    return dataclasses.replace(outputs, d_hidden=d_hidden)


def computed(
    inputs: Inputs,
    settings: Settings,
    needs: Needs,
    precision: str | None,
    memory_budget: int | None,
    low_memory: bool,
    chunks: Chunks | None,
) -> Outputs:
    """The fused path where it can run, else the plain one."""
    N, (V, H) = inputs.hidden.shape[0], inputs.head.shape
    refusal = refusal_of_kernels(inputs.hidden.device, inputs.dtype)
    if refusal is not None or N == 0:
        if refusal is not None:
            # On a CPU that is the way it goes, and nothing to warn of, unless somebody asked for something else.
            asked = precision == "bf16" or (precision == "difference" and settings.alpha > 0.0)
            level = logging.INFO if inputs.hidden.device.type == "cpu" and not asked else logging.WARNING
            but = f", with fp32 logits where precision {precision} was asked for" if asked else ""
            say_once(f"linear_kd takes the plain path{but}: {refusal}.", level)
        itemsize = torch.promote_types(inputs.dtype, torch.float32).itemsize
        if chunks is None:
            chunks = Chunks(rows := plain_rows(V, itemsize, memory_budget, low_memory), rows)
        return plain_linear_kd(inputs, settings, needs, chunks.rows)

    from forge.losses.linear_kd_triton import fused_linear_kd, refusal_of_difference

    obstacle = refusal_of_difference(inputs, settings)
    if precision == "difference" and obstacle is not None and settings.alpha > 0.0:
        say_once(f"linear_kd works with fp32 logits, not with their difference: {obstacle}.")
    if precision in (None, "difference"):
        precision = "fp32" if obstacle is not None else "difference"
    if chunks is None:
        models = 1 if inputs.teacher_head is None else 2
        bytes_of = {"difference": 2, "fp32": 4 * models, "bf16": inputs.dtype.itemsize * (models - 1)}
        chunks = plan_chunks(
            N,
            V,
            H,
            logit_bytes=bytes_of[precision],
            gradient_bytes=inputs.dtype.itemsize,
            head_gradient_bytes=stored(inputs.head.dtype).itemsize if needs.head else 0,
            memory_budget=memory_budget,
            low_memory=low_memory,
        )
    with torch.cuda.device(inputs.hidden.device):
        return fused_linear_kd(inputs, settings, needs, chunks, precision)


def refusal_of_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run, or None where they can."""
    if device.type != "cuda":
        return f"its kernels need a CUDA device, and the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels do not compute in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


_said: set[str] = set()


def say_once(message: str, level: int = logging.WARNING) -> None:
    if message not in _said:
        _said.add(message)
        logger.log(level, message)
