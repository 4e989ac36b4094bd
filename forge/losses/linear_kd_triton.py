"""The fused CUDA path of the distillation loss: one product of logit differences, and one kernel for every loss.

It needs triton, so it is imported only if the path is taken. The algorithm and its numbers are in docs/kernels.md.
"""

import dataclasses

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from forge.losses import kd_kernels
from forge.losses.kd_settings import TAIL_FLOOR, Chunks, Inputs, Needs, Outputs, Settings, row_pitch
from forge.losses.products import gradient_dtype

INTERPRETED = triton.knobs.runtime.interpret
# Measured on an H100: with eight warps and four stages these tiles are as fast as cuBLAS; 128 x 128 is 15 % slower.
TILE_M, TILE_N, TILE_K, GROUP = (16, 64, 32, 2) if INTERPRETED else (128, 256, 64, 16)
# What a skew divergence is at the end of its range, where the kernel would compute the logarithm of 0.
WITHOUT_SKEW = {("skew_kl", 0.0): "forward_kl", ("skew_reverse_kl", 1.0): "reverse_kl"}
# Columns that a program of the row kernel computes at a time, and its warps: float32 logits need more in flight.
NARROW_BLOCK, WIDE_BLOCK = ((128, 4), (128, 4)) if INTERPRETED else ((1024, 8), (8192, 32))


def fused_linear_kd(inputs: Inputs, settings: Settings, needs: Needs, chunks: Chunks, precision: str) -> Outputs:
    """Return the sums and gradients of forge.losses.linear_kd on one CUDA device, without a host sync.

    precision: difference (float16 teacher logits, float16 differences), fp32 (both models' logits in float32) or bf16
    (both in the inputs' dtype). All reductions are in float32 and in a fixed order.
    """
    N, V = inputs.hidden.shape[0], inputs.head.shape[0]
    device, hidden_dtype, head_dtype = inputs.hidden.device, inputs.hidden.dtype, inputs.head.dtype
    inputs = in_product_dtype(inputs)
    chunks = Chunks(min(chunks.rows, chunks.wide, N), min(chunks.wide, N))
    one_pass = chunks.wide >= N
    sums = torch.zeros(2, N, dtype=torch.float32, device=device)
    d_hidden = torch.empty(inputs.hidden.shape if needs.hidden else 0, dtype=inputs.dtype, device=device)
    d_head_dtype = gradient_dtype(head_dtype) if one_pass else torch.float32
    d_head = torch.empty(inputs.head.shape if needs.head else 0, dtype=d_head_dtype, device=device)
    d_bias = torch.zeros(V if needs.bias else 0, dtype=torch.float32, device=device)
    # dW is written last when there is one pass, so its memory can hold logits until then.
    buffers = Buffers(inputs, chunks, precision, needs.any, free=d_head if one_pass else d_head[:0])

    for wide_start in range(0, N, chunks.wide):
        wide_stop = min(N, wide_start + chunks.wide)
        loss_chunks(inputs, settings, wide_start, wide_stop, buffers, sums)
        if not needs.any:
            continue
        d_logits = buffers.gradients[: wide_stop - wide_start, :V]
        head_gradients(d_logits, inputs, wide_start, d_hidden, d_head, d_bias)
        del d_logits

    del buffers  # before the cast asks for memory
    d_head = d_head.to(gradient_dtype(head_dtype))
    d_bias = d_bias if inputs.bias is None else d_bias.to(gradient_dtype(inputs.bias.dtype))
    ce_sum, kl_sum = sums.sum(1)
    return Outputs(ce_sum, kl_sum.clone(), d_hidden.to(hidden_dtype), d_head, d_bias)


def in_product_dtype(inputs: Inputs) -> Inputs:
    """Return the inputs in the dtypes of their products (a copy under autocast), and the teacher's head unpadded."""
    teacher_hidden, teacher_head = inputs.teacher_hidden, inputs.teacher_head
    if teacher_hidden is not None and teacher_head is not None:
        teacher_hidden = teacher_hidden.to(inputs.teacher_dtype)
        teacher_head = teacher_head[: inputs.shared].to(inputs.teacher_dtype)
    return dataclasses.replace(
        inputs,
        hidden=inputs.hidden.to(inputs.dtype),
        head=inputs.head.to(inputs.dtype),
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
    )


def head_gradients(
    d_logits: Tensor, inputs: Inputs, start: int, d_hidden: Tensor, d_head: Tensor, d_bias: Tensor
) -> None:
    """Write the rows of d_hidden from start on, and add to d_head and d_bias; an empty one is not wanted."""
    part = slice(start, start + d_logits.shape[0])
    if d_hidden.numel():
        product(d_logits, inputs.head, d_hidden[part])
    if d_head.numel():
        product(d_logits.T, inputs.hidden[part], d_head, add=start > 0)
    if d_bias.numel():
        d_bias += d_logits.sum(0, dtype=torch.float32)


class Buffers:
    """The scratch memory of one call: logits of chunks.rows positions, and gradients of chunks.wide."""

    def __init__(self, inputs: Inputs, chunks: Chunks, precision: str, gradient: bool, free: Tensor) -> None:
        device, dtype = inputs.hidden.device, inputs.dtype
        pitch = row_pitch(inputs.head.shape[0])
        self.rows = chunks.rows
        self.difference = precision == "difference"
        self.gradient = gradient
        narrow = torch.float16 if self.difference else torch.float32 if precision == "fp32" else dtype
        held = chunks.wide if gradient else chunks.rows
        self.gradients = torch.empty(held, pitch, dtype=dtype, device=device)
        # Differences, and student logits in the dtype of the gradients, use the memory that their gradients will.
        self.student = self.teacher = None
        tiles = triton.cdiv(inputs.head.shape[0], TILE_N)
        self.tops = torch.empty(chunks.rows, tiles if self.difference else 0, dtype=torch.float32, device=device)
        if self.difference:
            self.teacher = scratch(free, (chunks.rows, pitch), narrow)
        else:
            if narrow != dtype:
                self.student = scratch(free, (chunks.rows, pitch), narrow)
            if inputs.teacher_head is not None:
                self.teacher = torch.empty(chunks.rows, pitch, dtype=narrow, device=device)

    def of(self, start: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the memory of the teacher's logits, of the student's or the differences, and of the gradients.

        start: the first row, counted from the start of the wide chunk.
        """
        place = start if self.gradient else 0
        d_logits = self.gradients[place : place + rows]
        student = d_logits if self.student is None else self.student[:rows]
        if self.difference:
            student = student.view(torch.float16)
        return student if self.teacher is None else self.teacher[:rows], student, d_logits


def loss_chunks(
    inputs: Inputs,
    settings: Settings,
    first: int,
    last: int,
    buffers: Buffers,
    sums: Tensor,
) -> None:
    """Compute logits, losses and gradients of the rows from first to last, buffers.rows at a time."""
    for start in range(first, last, buffers.rows):
        part = slice(start, min(last, start + buffers.rows))
        teacher, student, d_logits = buffers.of(start - first, part.stop - part.start)
        if buffers.difference:
            difference_product(inputs, settings, part, teacher, student, buffers.tops)
        else:
            product(inputs.hidden[part], inputs.head.T, student[:, : inputs.head.shape[0]])
            if inputs.teacher_hidden is not None and inputs.teacher_head is not None:
                product(inputs.teacher_hidden[part], inputs.teacher_head.T, teacher[:, : inputs.shared])
        loss_rows(inputs, settings, part, teacher, student, d_logits, sums[:, part], buffers)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor, computed in float32 and rounded once; factor () stays on the device."""
    gradient = gradient.contiguous()
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    size, block = gradient.numel(), 64 if INTERPRETED else 4096
    if size:
        kd_kernels.scale[(triton.cdiv(size, block),)](gradient, factor.float(), out, size, BLOCK=block, num_warps=8)
    return out


def refusal_of_difference(inputs: Inputs, settings: Settings) -> str | None:
    """Return why the difference form cannot run on these inputs, or None if it can."""
    if inputs.teacher_head is None:
        return "it needs a teacher's hidden states and head"
    if inputs.dtype != torch.bfloat16 or inputs.teacher_dtype != torch.bfloat16:
        return "both models must be in bfloat16"
    if inputs.bias is not None or inputs.teacher_bias is not None or settings.softcap or settings.teacher_softcap:
        return "a bias or a softcap comes between hidden states and logits"
    if settings.logit_scale == 0.0:
        return "logit_scale is 0"
    if not INTERPRETED and torch.cuda.get_device_capability(inputs.hidden.device) < (9, 0):
        return "the GPU is older than sm_90"
    for name in ("head", "teacher_head"):
        weight = getattr(inputs, name)
        if weight.stride(1) != 1 or weight.stride(0) * 2 % 16 or weight.data_ptr() % 16:
            return f"the rows of the {name.replace('_', ' ')} are not 16-byte aligned"
    return None


def scratch(free: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor, in the memory of `free` if that is large enough."""
    size = shape[0] * shape[1] * dtype.itemsize
    if free.numel() * free.element_size() < size:
        return torch.empty(shape, dtype=dtype, device=free.device)
    return free.view(-1).view(torch.uint8)[:size].view(dtype).view(shape)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Compute out = a @ b, or out += a @ b, with sums in float32, rounded once to the dtype of out."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        result = a.float() @ b.float()
        out.copy_(out + result if add else result)


def difference_product(
    inputs: Inputs, settings: Settings, part: slice, teacher: Tensor, difference: Tensor, tops: Tensor
) -> None:
    """Write the teacher's logits minus tops, and student - teacher, both float16, for the rows of part.

    tops: (rows, tiles) float32, the teacher's largest logit of each row in each tile of TILE_N columns. One accumulator
    takes both products, so that the difference is rounded, and its operands are not.
    """
    assert inputs.teacher_hidden is not None
    assert inputs.teacher_head is not None
    V, shared = inputs.head.shape[0], inputs.shared
    teacher_hidden, student_hidden = aligned(inputs.teacher_hidden[part]), aligned(inputs.hidden[part])
    rows = student_hidden.shape[0]
    tiles = triton.cdiv(rows, TILE_M) * triton.cdiv(V, TILE_N)
    programs = min(tiles, 3 if INTERPRETED else multiprocessors(teacher.device))
    describe = TensorDescriptor.from_tensor
    kd_kernels.difference_product[(programs,)](
        describe(teacher_hidden, [TILE_M, TILE_K]),
        describe(inputs.teacher_head, [TILE_N, TILE_K]),
        describe(student_hidden, [TILE_M, TILE_K]),
        describe(inputs.head, [TILE_N, TILE_K]),
        teacher,
        difference,
        tops,
        rows,
        V,
        shared,
        teacher_hidden.shape[1],
        student_hidden.shape[1],
        teacher.stride(0),
        settings.teacher_logit_scale,
        settings.logit_scale,
        PADDED=shared < V,
        SCALED=settings.logit_scale != 1.0 or settings.teacher_logit_scale != 1.0,
        TILE_M=TILE_M,
        TILE_N=TILE_N,
        TILE_K=TILE_K,
        GROUP=GROUP,
        PROGRAMS=programs,
        FLATTEN=not INTERPRETED,
        WIDEN=INTERPRETED,
        RAGGED=shared % TILE_N != 0 or V % TILE_N != 0,
        num_warps=8,
        num_stages=4,
    )


def aligned(x: Tensor) -> Tensor:
    """Return x, copied if its rows are not laid out as the tensor memory accelerator reads them."""
    fits = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def loss_rows(
    inputs: Inputs,
    settings: Settings,
    part: slice,
    teacher: Tensor,
    student: Tensor,
    d_logits: Tensor,
    sums: Tensor,
    buffers: Buffers,
) -> None:
    """Write each row's CE and D to sums (2, rows), and the gradient of its logits to d_logits."""
    rows, pitch = d_logits.shape
    V, shared = inputs.head.shape[0], inputs.shared
    sparse = inputs.top_log_probs is not None
    dense = inputs.teacher_head is not None
    log_q = inputs.top_log_probs[part].contiguous() if inputs.top_log_probs is not None else sums
    indices = inputs.top_indices[part].contiguous() if inputs.top_indices is not None else inputs.labels
    T = settings.temperature
    block, warps = WIDE_BLOCK if student.dtype == torch.float32 else NARROW_BLOCK
    kd_kernels.loss_rows[(rows,)](
        teacher,
        student,
        d_logits,
        buffers.tops,
        inputs.labels[part].contiguous(),
        sums,
        sums.stride(0),
        teacher.stride(0),
        student.stride(0),
        d_logits.stride(0),
        inputs.bias if inputs.bias is not None else sums,
        inputs.teacher_bias if inputs.teacher_bias is not None else sums,
        log_q,
        indices,
        V,
        shared,
        log_q.shape[1] if sparse else 0,
        1.0 / T,
        1.0 - settings.alpha,
        settings.alpha * T,
        settings.mix,
        settings.logit_scale,
        settings.softcap,
        settings.teacher_logit_scale,
        settings.teacher_softcap,
        settings.ignore_index,
        TEACHER="dense" if dense else "sparse" if sparse else "none",
        DIVERGENCE=WITHOUT_SKEW.get((settings.divergence, settings.mix), settings.divergence),
        MISSING=settings.missing_mass,
        DIFFERENCE=buffers.difference,
        GRADIENT=buffers.gradient,
        POWER=int(T) if T in (1.0, 2.0) and shared == V else 0,
        PADDED=shared < V,
        RAGGED=pitch != V,
        BIAS=inputs.bias is not None,
        TEACHER_BIAS=inputs.teacher_bias is not None,
        SCALE=settings.logit_scale != 1.0,
        TEACHER_SCALE=settings.teacher_logit_scale != 1.0,
        CAP=settings.softcap > 0.0,
        TEACHER_CAP=settings.teacher_softcap > 0.0,
        PITCH=pitch,
        K_BLOCK=triton.next_power_of_2(log_q.shape[1]) if sparse else 1,
        FLOOR=TAIL_FLOOR,
        TILE=TILE_N if buffers.difference else block,
        BLOCK=block,
        num_warps=warps,
    )
