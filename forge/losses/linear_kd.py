"""The distillation loss from hidden states and heads, without the full logits of either model."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from forge.losses import products
from forge.losses.checks import (
    check_computing,
    check_formula,
    check_head_input,
    check_labels,
    check_same_rows,
    check_top_k,
    student_dtype,
    teacher_dtype,
)
from forge.losses.kd_arguments import Computing, Formula, HeadInput, KDLoss, TopK
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
from forge.losses.linear_kd_plain import plain_linear_kd
from forge.losses.products import gradient_dtype, wants_gradient

logger = logging.getLogger(__name__)


def linear_kd(
    student: HeadInput,
    teacher: HeadInput | TopK | None,
    labels: Tensor,
    formula: Formula = Formula(),  # noqa: B008 - frozen
    computing: Computing = Computing(),  # noqa: B008 - frozen
) -> KDLoss:
    """Return (1 - alpha) * CE + alpha * T^2 * D(teacher || student), summed over the rows that count.

        kd = linear_kd(HeadInput(h, W), HeadInput(h_teacher, W_teacher), labels, Formula(alpha=0.9, temperature=2.0))
        kd.loss_mean.backward()

    The full logits (N, V) of either model never exist. Triton kernels compute the loss on a CUDA device, plain torch
    elsewhere, also in chunks. Both give the same numbers up to rounding, and each is deterministic.

    Args:
        student: N rows of hidden states with their head of V columns. Gradients flow into hidden, weight and bias.
            Under autocast its product is computed in autocast's dtype; softmaxes and sums are at least float32.
        teacher: as many rows of its own width, with a head of any number of columns in its own dtype, which autocast
            leaves alone; or its top k, for forward_kl; or None if alpha is 0. It gets no gradient.
        labels: (N,) int64, already shifted: labels[i] is the token that row i predicts, or formula.ignore_index for a
            row that counts neither in CE nor in D.
        formula: alpha, temperature and divergence; see Formula.
        computing: precision and memory; see Computing.

    Returns:
        Sums over the counted rows, in nats: float32 scalars, or float64 for float64 inputs. Only loss_sum has a
        gradient, of which forward computes all but the factor: backward only scales it, and there is no double
        backward. If no row counts, the sums and the gradients are 0.

    Raises:
        ValueError: shapes or dtypes disagree, or a setting has no meaning.

    torch.compile sees one operator. The algorithm and its numbers are in docs/kernels.md.
    """
    check_formula(formula)
    check_computing(computing)
    check_head_input(student, "student")
    check_labels(labels, student.hidden, "student.hidden")
    dense, top = _checked_teacher(teacher, student, formula)
    dtype = student_dtype(student)
    total, ce_sum, divergence_sum, _, _, _ = torch.ops.forge.linear_kd(
        student.hidden,
        student.weight,
        labels,
        student.bias,
        None if dense is None else dense.hidden.detach(),
        None if dense is None else dense.weight.detach(),
        None if dense is None or dense.bias is None else dense.bias.detach(),
        None if top is None else top.log_probs.detach(),
        None if top is None else top.indices,
        [
            float(formula.alpha),
            float(formula.temperature),
            teacher_share(formula.divergence, formula.beta, formula.skew),
            float(student.scale),
            float(student.softcap or 0.0),
            1.0 if dense is None else float(dense.scale),
            0.0 if dense is None else float(dense.softcap or 0.0),
        ],
        formula.divergence,
        formula.missing_mass,
        formula.ignore_index,
        dtype,
        dtype if dense is None else teacher_dtype(dense),
        [wants_gradient(x) for x in (student.hidden, student.weight, student.bias)],
        computing.compact,
        computing.precision,
        computing.memory_budget,
        computing.low_memory,
        None if computing.chunks is None else [computing.chunks.rows, computing.chunks.wide],
    )
    count = (labels != formula.ignore_index).sum()
    return KDLoss(total, ce_sum.detach(), divergence_sum.detach(), count)


def _checked_teacher(
    teacher: HeadInput | TopK | None, student: HeadInput, formula: Formula
) -> tuple[HeadInput | None, TopK | None]:
    """Return the teacher in the one of its two forms that it has; at alpha 0 it has none, and is not looked at."""
    if formula.alpha == 0.0:
        return None, None
    if isinstance(teacher, HeadInput):
        check_head_input(teacher, "teacher")
        check_same_rows(student.hidden, teacher.hidden, ".hidden")
        return teacher, None
    if teacher is None:
        raise ValueError("alpha > 0 needs a teacher: HeadInput or TopK, got None.")
    check_top_k(teacher, len(student.hidden), formula.divergence)
    return None, teacher


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
    """Return the sums of loss, CE and D, and the loss's gradients in hidden, head and bias; empty if not wanted."""
    alpha, temperature, mix, scale, cap, teacher_scale, teacher_cap = numbers
    settings = Settings(
        alpha, temperature, divergence, mix, missing_mass, scale, cap, teacher_scale, teacher_cap, ignore_index
    )
    teacher = (teacher_hidden, teacher_head, teacher_bias, top_log_probs, top_indices)
    inputs = Inputs(hidden, head, labels, bias, *teacher, dtype=dtype, teacher_dtype=teacher_dtype)
    chunks = None if chunk_sizes is None else Chunks(*chunk_sizes)
    needs, computing = Needs(*wanted), Computing(precision, memory_budget, low_memory, chunks)
    compute = partial(computed, settings=settings, needs=needs, computing=computing)
    with torch.autocast(hidden.device.type, enabled=False):  # which would round the float32 sums of the plain path
        outputs = compacted(inputs, ignore_index, needs, compute) if compact else compute(inputs)
    total = (1.0 - alpha) * outputs.ce_sum + alpha * temperature**2 * outputs.kl_sum
    return total, outputs.ce_sum, outputs.kl_sum, outputs.d_hidden, outputs.d_head, outputs.d_bias


@linear_kd_operator.register_fake
def _(hidden, head, labels, bias, *others):  # type: ignore[no-untyped-def]
    dtype, wanted = others[-8], others[-6]
    work = torch.promote_types(dtype, torch.float32)
    total, ce_sum, kl_sum = (head.new_empty((), dtype=work) for _ in range(3))
    d_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    d_head = head.new_empty(head.shape if wanted[1] else 0, dtype=gradient_dtype(head.dtype))
    bias_dtype = gradient_dtype(work if bias is None else bias.dtype)
    d_bias = head.new_empty(head.shape[0] if wanted[2] else 0, dtype=bias_dtype)
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


def compacted(inputs: Inputs, ignore_index: int, needs: Needs, compute: Callable[[Inputs], Outputs]) -> Outputs:
    """Compute on the counted rows alone; torch.nonzero waits for the device."""
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


def computed(inputs: Inputs, settings: Settings, needs: Needs, computing: Computing) -> Outputs:
    """Take the fused path where it can run, else the plain one."""
    refusal = products.refusal_of_kernels(inputs.hidden.device, inputs.dtype)
    if refusal is not None:
        # On a CPU that is expected, so it is no warning unless another precision was asked for.
        precision = computing.precision
        asked = precision == "bf16" or (precision == "difference" and settings.alpha > 0.0)
        level = logging.INFO if inputs.hidden.device.type == "cpu" and not asked else logging.WARNING
        but = f", with fp32 logits instead of precision {precision}" if asked else ""
        say_once(f"linear_kd takes the plain path{but}: {refusal}.", level)
    if refusal is not None or len(inputs.hidden) == 0:
        itemsize = torch.promote_types(inputs.dtype, torch.float32).itemsize
        rows = plain_rows(len(inputs.head), itemsize, computing.memory_budget, computing.low_memory)
        return plain_linear_kd(inputs, settings, needs, rows if computing.chunks is None else computing.chunks.rows)

    from forge.losses.linear_kd_triton import fused_linear_kd, refusal_of_difference

    obstacle = refusal_of_difference(inputs, settings)
    if computing.precision == "difference" and obstacle is not None and settings.alpha > 0.0:
        say_once(f"linear_kd uses fp32 logits instead of precision difference: {obstacle}.")
    precision = computing.precision or "difference"
    if precision == "difference" and obstacle is not None:
        precision = "fp32"
    chunks = computing.chunks or planned_chunks(inputs, needs, computing, precision)
    with torch.cuda.device(inputs.hidden.device):
        return fused_linear_kd(inputs, settings, needs, chunks, precision)


def planned_chunks(inputs: Inputs, needs: Needs, computing: Computing, precision: str) -> Chunks:
    """Return the chunks of the fused path that fit the memory budget."""
    models = 1 if inputs.teacher_head is None else 2
    bytes_of = {"difference": 2, "fp32": 4 * models, "bf16": inputs.dtype.itemsize * (models - 1)}
    return plan_chunks(
        len(inputs.hidden),
        *inputs.head.shape,
        logit_bytes=bytes_of[precision],
        gradient_bytes=inputs.dtype.itemsize,
        head_gradient_bytes=gradient_dtype(inputs.head.dtype).itemsize if needs.head else 0,
        memory_budget=computing.memory_budget,
        low_memory=computing.low_memory,
    )


_said: set[str] = set()


def say_once(message: str, level: int = logging.WARNING) -> None:
    if message not in _said:
        _said.add(message)
        logger.log(level, message)
