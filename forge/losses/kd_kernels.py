"""The Triton kernels of the distillation loss: the difference product, the row kernel and the scale pass."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from forge.losses import kd_settings

EQUAL = tl.constexpr(kd_settings.EQUAL)
LOWEST = tl.constexpr(-1.0e30)  # where a running maximum starts: finite, so that -inf - LOWEST is no NaN


@triton.jit
def difference_product(
    teacher_hidden,
    teacher_head,
    student_hidden,
    student_head,
    teacher_out,
    difference_out,
    tops,
    rows,
    V,
    shared,
    teacher_width,
    student_width,
    pitch,
    teacher_scale,
    student_scale,
    PADDED: tl.constexpr,
    SCALED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    WIDEN: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Run the teacher's K loop, store its tile, keep its negative, and run the student's K loop on top of that.

    teacher_out: the teacher's logits minus the largest of their row in the tile, which goes to tops (rows, tiles).
    """
    tiles_m = tl.cdiv(rows, TILE_M)
    tiles_n = tl.cdiv(V, TILE_N)
    group_tiles = GROUP * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        # Neighbouring programs share columns of the heads while those are in L2.
        first_m = (tile // group_tiles) * GROUP
        group = min(tiles_m - first_m, GROUP)
        m = (first_m + (tile % group_tiles) % group) * TILE_M
        n = ((tile % group_tiles) // group) * TILE_N
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, tl.cdiv(teacher_width, TILE_K)):
            a = teacher_hidden.load([m, k * TILE_K])
            b = teacher_head.load([n, k * TILE_K])
            if WIDEN:  # the interpreter multiplies the bits of bfloat16 as integers
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b.T, total)
        row = m + tl.arange(0, TILE_M)
        column = n + tl.arange(0, TILE_N)
        place = row[:, None].to(tl.int64) * pitch + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < V)
        if SCALED:
            total = total * teacher_scale
        # Near the tile's largest logit, where the probability is, float16 is finest.
        known = total
        if RAGGED:
            known = tl.where(column[None, :] < shared, total, float("-inf"))
        top = tl.max(known, 1)
        if PADDED:
            top = tl.where(top == float("-inf"), 0.0, top)  # a tile that the teacher does not reach
        coarse = (total - top[:, None]).to(tl.float16)
        tl.store(teacher_out + place, coarse, mask=inside)
        tl.store(tops + row.to(tl.int64) * tiles_n + n // TILE_N, top, mask=row < rows)
        total = -total
        if SCALED:
            total = total / student_scale
        for k in range(0, tl.cdiv(student_width, TILE_K)):
            a = student_hidden.load([m, k * TILE_K])
            b = student_head.load([n, k * TILE_K])
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b.T, total)
        if SCALED:
            total = total * student_scale
        if PADDED:
            # Columns the teacher lacks: total is the student's logit alone, kept as a rounded part and the rest.
            alone = column[None, :] >= shared
            rest = total - top[:, None]
            coarse = rest.to(tl.float16)
            tl.store(teacher_out + place, coarse, mask=inside & alone)
            total = tl.where(alone, rest - coarse.to(tl.float32), total)
        tl.store(difference_out + place, total.to(tl.float16), mask=inside)


@triton.jit
def loss_rows(
    teacher,
    student,
    d_logits,
    tops,
    labels,
    sums,
    sums_stride,
    teacher_pitch,
    student_pitch,
    gradient_pitch,
    bias,
    teacher_bias,
    top_log_q,
    top_indices,
    V,
    shared,
    K,
    inv_t,
    ce_weight,
    kl_weight,
    mix,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    ignore_index,
    TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    MISSING: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    GRADIENT: tl.constexpr,
    POWER: tl.constexpr,
    PADDED: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    PITCH: tl.constexpr,
    K_BLOCK: tl.constexpr,
    FLOOR: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one row: statistics, then CE, D and the logits' gradient, which may overwrite the student's logits.

    teacher, student: (rows, pitch) logits, or with DIFFERENCE what difference_product writes, with its tops. sums: CE
    and D of each row, sums_stride apart. POWER is T if exp at 1 is computed as that power of exp at T, else 0.
    Statistics come from the rounded logits that the gradient is made of: otherwise the sum of p would not be 1.
    """
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_pitch
    student += row * student_pitch
    d_logits += row * gradient_pitch
    label = tl.load(labels + row)
    tops += row * tl.cdiv(V, TILE)
    lane = tl.arange(0, BLOCK // TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    nothing = tl.zeros([BLOCK // TILE, TILE], tl.float32)
    blocks = tl.cdiv(V, BLOCK)
    if label == ignore_index:
        if GRADIENT:
            for i in range(0, blocks):
                column = i * BLOCK + lane
                tl.store(d_logits + column, nothing.to(d_logits.dtype.element_ty), mask=column < PITCH)
        tl.store(sums + row, 0.0)
        tl.store(sums + sums_stride + row, 0.0)
        return

    # Pass 1: a maximum and a sum per lane, reduced across lanes only once.
    top = nothing + LOWEST
    sum_1 = nothing
    sum_s = sum_1
    sum_t = sum_1
    top_s = top
    top_t = top
    for i in range(0, blocks):
        x, x_shared, z, d = load_logits(
            teacher, student, tops, bias, teacher_bias, i, lane, V, shared, scale, cap, teacher_scale, teacher_cap,
            TEACHER, DIFFERENCE, PADDED, RAGGED, BIAS, TEACHER_BIAS, SCALE, TEACHER_SCALE, CAP, TEACHER_CAP, PITCH,
            TILE, BLOCK, "evict_last",
        )  # fmt: skip
        a = x - top
        if POWER != 0 and TEACHER != "none":
            e_s = tl.exp(-tl.abs(a) * inv_t)
            e_1 = e_s * e_s if POWER == 2 else e_s
            sum_s = tl.where(a > 0.0, sum_s * e_s + 1.0, sum_s + e_s)
        else:
            e_1 = tl.exp(-tl.abs(a))
            if TEACHER != "none":
                b = x_shared - top_s
                e_s = tl.exp(-tl.abs(b) * inv_t)
                sum_s = tl.where(b > 0.0, sum_s * e_s + 1.0, sum_s + e_s)
                top_s = tl.maximum(top_s, x_shared)
        sum_1 = tl.where(a > 0.0, sum_1 * e_1 + 1.0, sum_1 + e_1)
        top = tl.maximum(top, x)
        if TEACHER == "dense":
            a = z - top_t
            e_t = tl.exp(-tl.abs(a) * inv_t)
            sum_t = tl.where(a > 0.0, sum_t * e_t + 1.0, sum_t + e_t)
            top_t = tl.maximum(top_t, z)
    row_top = tl.max(top)
    log_1 = row_top + tl.log(tl.sum(sum_1 * tl.exp(top - row_top)))
    log_s = 0.0
    log_t = 0.0
    if TEACHER != "none":
        if POWER != 0:
            top_s = top
        row_top = tl.max(top_s)
        log_s = row_top * inv_t + tl.log(tl.sum(sum_s * tl.exp((top_s - row_top) * inv_t)))
    if TEACHER == "dense":
        row_top = tl.max(top_t)
        log_t = row_top * inv_t + tl.log(tl.sum(sum_t * tl.exp((top_t - row_top) * inv_t)))

    # Before anything is overwritten. A label outside the vocabulary gives NaN, not a read out of bounds.
    known = (label >= 0) & (label < V)
    raw = tl.load(student + label, mask=known, other=float("nan")).to(tl.float32)
    if DIFFERENCE:
        label_logit = raw + tl.load(teacher + label, mask=known, other=0.0).to(tl.float32)
        label_logit += tl.load(tops + label // TILE, mask=known, other=0.0)
    else:
        label_logit = head_logit(raw, bias, label, known, scale, cap, BIAS, SCALE, CAP)
    tl.store(sums + row, tl.where(known, log_1 - label_logit, float("nan")))
    shift = log_t - log_s

    # Every divergence but forward KL needs one number of the row, sum p g, before its gradient.
    pulled = 0.0
    kl = nothing
    if TEACHER == "dense" and DIVERGENCE != "forward_kl":
        pull_sum = nothing
        for i in range(0, blocks):
            x, x_shared, z, d = load_logits(
                teacher, student, tops, bias, teacher_bias, blocks - 1 - i, lane, V, shared, scale, cap,
                teacher_scale, teacher_cap, TEACHER, DIFFERENCE, PADDED, RAGGED, BIAS, TEACHER_BIAS, SCALE,
                TEACHER_SCALE, CAP, TEACHER_CAP, PITCH, TILE, BLOCK, "evict_last",
            )  # fmt: skip
            p, q, delta = probabilities(x_shared, z, d, inv_t, log_s, log_t, shift, DIFFERENCE)
            value, pull = pull_of(p, q, delta, mix, DIVERGENCE)
            kl += value
            pull_sum += pull
        pulled = tl.sum(pull_sum)

    if TEACHER == "sparse":
        k = tl.arange(0, K_BLOCK)
        log_q = tl.load(top_log_q + row * K + k, mask=k < K, other=float("-inf")).to(tl.float32)
        column_k = tl.load(top_indices + row * K + k, mask=k < K, other=0)
        present = log_q > float("-inf")
        if MISSING == "renormalise":
            highest = tl.max(log_q, 0)
            log_q -= highest + tl.log(tl.sum(tl.exp(log_q - highest), 0))
        raw_k = tl.load(student + column_k, mask=present, other=0.0).to(tl.float32)
        x_k = head_logit(raw_k, bias, column_k, present, scale, cap, BIAS, SCALE, CAP)
        log_p_k = x_k * inv_t - log_s
        p_k = tl.exp(log_p_k)
        q_k = tl.where(present, tl.exp(log_q), 0.0)  # also in a row without any
        mass = tl.sum(q_k, 0)
        row_kl = tl.sum(tl.where(q_k > 0.0, q_k * (log_q - log_p_k), 0.0), 0)
        rest = mass  # what p is multiplied by in the gradient of the other columns
        if MISSING == "tail":
            tail = 1.0 - mass
            tail = tl.where(tail > FLOOR, tail, 0.0)
            student_tail = tl.maximum(1.0 - tl.sum(p_k, 0), FLOOR)
            row_kl += tl.where(tail > 0.0, tail * (tl.log(tl.where(tail > 0.0, tail, 1.0)) - tl.log(student_tail)), 0.0)
            rest = 1.0 - tail / student_tail
            mass = 1.0

    if GRADIENT or (TEACHER == "dense" and DIVERGENCE == "forward_kl"):
        tl.debug_barrier()  # no thread may overwrite a logit of the label or the top k before all have read them
        for i in range(0, blocks):
            block = i
            if TEACHER != "dense" or DIVERGENCE == "forward_kl":
                block = blocks - 1 - i  # backwards: what was read last is still in L2
            column = block * BLOCK + lane
            x, x_shared, z, d = load_logits(
                teacher, student, tops, bias, teacher_bias, block, lane, V, shared, scale, cap, teacher_scale,
                teacher_cap, TEACHER, DIFFERENCE, PADDED, RAGGED, BIAS, TEACHER_BIAS, SCALE, TEACHER_SCALE, CAP,
                TEACHER_CAP, PITCH, TILE, BLOCK, "evict_first",
            )  # fmt: skip
            gradient = nothing
            if TEACHER == "dense":
                p, q, delta = probabilities(x_shared, z, d, inv_t, log_s, log_t, shift, DIFFERENCE)
                if DIVERGENCE == "forward_kl":
                    # sum (p - q) is 0: with it every term is positive, and equal models give exactly 0.
                    kl += p - q - tl.where(q > 0.0, q * delta, 0.0)
                    gradient = p - q
                else:
                    value, pull = pull_of(p, q, delta, mix, DIVERGENCE)
                    gradient = pull - p * pulled
            if TEACHER == "sparse":
                p = tl.exp(x * inv_t - log_s)
                gradient = p * rest
            if GRADIENT:
                if POWER == 2 and TEACHER != "none":
                    p_1 = p * p * tl.exp(2.0 * log_s - log_1)
                elif POWER == 1 and TEACHER != "none":
                    p_1 = p
                else:
                    p_1 = tl.exp(x - log_1)
                gradient = kl_weight * gradient + ce_weight * (p_1 - tl.where(column == label, 1.0, 0.0))
                gradient = slope(gradient, x, scale, cap, SCALE, CAP)
                if RAGGED:
                    gradient = tl.where(column < V, gradient, 0.0)
                tl.store(
                    d_logits + column,
                    gradient.to(d_logits.dtype.element_ty),
                    mask=column < PITCH,
                    eviction_policy="evict_first",
                )
    if TEACHER == "sparse":
        if GRADIENT:
            tl.debug_barrier()  # the top k are written again, by other threads
            p_1 = tl.exp(x_k - log_1)
            fixed = kl_weight * (p_k * mass - q_k) + ce_weight * (p_1 - tl.where(column_k == label, 1.0, 0.0))
            fixed = slope(fixed, x_k, scale, cap, SCALE, CAP)
            tl.store(d_logits + column_k, fixed.to(d_logits.dtype.element_ty), mask=present)
        tl.store(sums + sums_stride + row, row_kl)
    else:
        tl.store(sums + sums_stride + row, tl.sum(kl))


@triton.jit
def load_logits(
    teacher, student, tops, bias, teacher_bias, block, lane, V, shared, scale, cap, teacher_scale, teacher_cap,
    TEACHER: tl.constexpr, DIFFERENCE: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr, BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, SCALE: tl.constexpr, TEACHER_SCALE: tl.constexpr, CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr, PITCH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Return student logits, those of shared columns, the teacher's, and student - teacher; -inf if there is none."""
    column = block * BLOCK + lane
    stored = column < PITCH  # a multiple of the vector width, unlike V
    if DIFFERENCE:
        z = tl.load(teacher + column, mask=stored, other=float("-inf"), eviction_policy=EVICTION).to(tl.float32)
        d = tl.load(student + column, mask=stored, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        if RAGGED:
            z = tl.where(column < V, z, float("-inf"))
            d = tl.where(column < V, d, 0.0)
        tile = block * (BLOCK // TILE) + tl.arange(0, BLOCK // TILE)
        z += tl.load(tops + tile, mask=tile < tl.cdiv(V, TILE), other=0.0)[:, None]
        x = z + d
        x_shared = x
        if PADDED:
            x_shared = tl.where(column < shared, x, float("-inf"))
            z = tl.where(column < shared, z, float("-inf"))
            d = tl.where(column < shared, d, 0.0)
    else:
        raw = tl.load(student + column, mask=stored, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        x = head_logit(raw, bias, column, column < V, scale, cap, BIAS, SCALE, CAP)
        x_shared = x
        z = x
        d = tl.zeros_like(x)
        if TEACHER == "dense":
            raw = tl.load(teacher + column, mask=stored, other=0.0, eviction_policy=EVICTION).to(tl.float32)
            z = head_logit(
                raw, teacher_bias, column, column < shared, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_SCALE,
                TEACHER_CAP,
            )  # fmt: skip
            if PADDED:
                x_shared = tl.where(column < shared, x, float("-inf"))
            lowest = tl.where(x_shared == float("-inf"), 0.0, float("inf"))
            d = tl.where(z == float("-inf"), lowest, x_shared - z)
    return x, x_shared, z, d


@triton.jit
def head_logit(raw, bias, column, inside, scale, cap, BIAS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Return cap * tanh(scale * (raw + bias) / cap), and -inf outside."""
    x = raw
    if BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        x = x * scale
    if CAP:
        e = tl.exp(-2.0 * tl.abs(x) / cap)
        tanh = (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0.0, -tanh, tanh) * cap
    return tl.where(inside, x, float("-inf"))


@triton.jit
def slope(gradient, x, scale, cap, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Return the gradient in what the head gave, from the gradient of logit x."""
    if SCALE:
        gradient = gradient * scale
    if CAP:
        gradient = gradient * (1.0 - (x / cap) * (x / cap))
    return gradient


@triton.jit
def probabilities(x, z, d, inv_t, log_s, log_t, shift, DIFFERENCE: tl.constexpr):
    """Return p, q and log p - log q; from the difference, p inherits the rounding of q and p - q loses nothing."""
    log_q = z * inv_t - log_t
    delta = d * inv_t + shift
    q = tl.exp(log_q)
    p = tl.exp(log_q + delta) if DIFFERENCE else tl.exp(x * inv_t - log_s)
    return p, q, delta


@triton.jit
def pull_of(p, q, delta, mix, DIVERGENCE: tl.constexpr):
    """Return an element's share of D, and p g with g = dD / dp; the table is in forge.losses.linear_kd_plain."""
    if DIVERGENCE == "reverse_kl":
        pull = tl.where(p > 0.0, p * delta, 0.0)
        value = pull - p + q
    elif DIVERGENCE == "tvd":
        value = 0.5 * tl.abs(p - q)
        pull = p * tl.where(delta > EQUAL, 0.5, tl.where(delta < -EQUAL, -0.5, 0.0))
    else:
        # log(p / m) and log(q / m), m = mix q + (1 - mix) p, without a large exponential
        small = tl.exp(-tl.abs(delta))
        p_larger = delta > 0.0
        log_m = tl.log(tl.where(p_larger, mix * small + (1.0 - mix), mix + (1.0 - mix) * small))
        if DIVERGENCE == "skew_reverse_kl":
            p_over_m = tl.where(p_larger, -log_m, delta - log_m)
            value = tl.where(p > 0.0, p * p_over_m, 0.0)
            pull = value - (1.0 - mix) * p * tl.exp(p_over_m)
        else:
            q_over_m = tl.where(p_larger, -delta - log_m, -log_m)
            value = tl.where(q > 0.0, q * q_over_m, 0.0)
            if DIVERGENCE == "jsd":
                p_over_m = tl.where(p_larger, -log_m, delta - log_m)
                pull = (1.0 - mix) * tl.where(p > 0.0, p * p_over_m, 0.0)
                value = mix * value + pull
            else:
                pull = -(1.0 - mix) * p * tl.exp(q_over_m)
    return value, pull


@triton.jit
def scale(source, factor, out, size, BLOCK: tl.constexpr):
    """Compute out = source * factor in float32, rounded once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + i, mask=i < size).to(tl.float32)
    tl.store(out + i, (x * tl.load(factor)).to(out.dtype.element_ty), mask=i < size)
