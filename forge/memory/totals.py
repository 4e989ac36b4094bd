"""The memory of a training step on each GPU and on the host under a plan: arithmetic alone, without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypedDict

from forge.config.plans import Plan
from forge.config.schema import LossConfig

if TYPE_CHECKING:
    from forge.losses.kd_settings import Chunks

GIB = 2**30
IN_4BIT = 0.516  # bytes of an NF4 weight: 0.5, and its constants, quantized too (arXiv 2305.14314, section 3)
# What none of these numbers counts on a GPU: CUDA's context, NCCL's buffers and what the allocator cannot use.
RESERVED = 5 * GIB // 2
MOST_ROWS = 1 << 16


@dataclass(frozen=True)
class Form:
    """The dtypes that training computes in. Without DeepSpeed weights are float32 and autocast rounds what products
    read; with it weights and products have one dtype."""

    weights: int  # bytes of a trained weight, and of the residual stream
    products: int  # bytes of what a product reads and gives
    on_cpu: bool = False  # where dropout and attention keep more than on a GPU

    @property
    def autocast(self) -> bool:
        return self.weights != self.products


@dataclass(frozen=True)
class Pass:
    """How a forward and its backward are run."""

    form: Form
    checkpointing: bool = False


@dataclass(frozen=True)
class RowBytes:
    """Bytes as a function of the rows of a micro-batch."""

    fixed: int
    per_row: int

    def of(self, rows: int) -> int:
        return self.fixed + rows * self.per_row


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, in elements. A weight that two layers share counts once."""

    architecture: str
    parameters: int
    trained: int
    linear: int  # in the weights of linear layers, the head left out: those that autocast copies
    in_4bit: int  # frozen weights that are kept in 4 bits
    largest_layer: int  # parameters of the largest layer
    head: int  # elements of the matrix that gives the logits; 0 for a model without one
    head_trained: bool
    columns: int  # of the logits
    width: int  # of what the head reads

    @property
    def frozen(self) -> int:
        return self.parameters - self.trained


@dataclass(frozen=True)
class Job:
    """What is trained, under any plan."""

    student: ModelSizes
    activations: Mapping[Pass, RowBytes]  # the student's, for every pass that is asked for; empty where not known
    teacher: ModelSizes | None  # None: there is no teacher in memory
    teacher_forward: RowBytes  # the most that a forward of the teacher holds
    placement: str  # of the teacher
    teacher_bytes: int  # of a weight of the teacher
    teacher_layers: int  # teacher layers whose hidden states the student is matched to
    half: bool  # mixed precision is bf16 or fp16
    on_cpu: bool
    rows: int  # of a micro-batch, at most
    tokens: int  # of a row, at most
    labels: int  # of a row, at most; with whole logits: its positions
    fused: bool  # the loss is computed from hidden states
    distils: bool  # alpha > 0
    top_k: int  # of a cached teacher
    checkpointing: bool
    loss: LossConfig  # how the fused loss is computed
    uncounted: str = ""  # why the activations are not known


@dataclass(frozen=True)
class Sharding:
    """Where a job is trained, and how its states are spread over the ranks."""

    plan: Plan | None  # None: every rank holds everything, and averages gradients through DDP
    teacher_plan: Plan | None  # for a teacher with the placement zero3
    ranks: int
    ranks_per_node: int


@dataclass(frozen=True)
class Estimate:
    """The bytes of a step on one GPU, and on the host of one node."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    loss: int
    buffers: int
    host: int  # not part of the total

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.host

    def as_gib(self) -> dict[str, float]:
        return {f"{name}_gib": round(value / GIB, 6) for name, value in {**asdict(self), "total": self.total}.items()}


def form_of(job: Job, plan: Plan | None) -> Form:
    """Return what training computes in under a plan.

    DeepSpeed keeps the weights in bf16 where training computes in half precision; without it they are float32, under
    autocast where training computes in half precision.
    """
    return form_for(job.half, job.on_cpu, plan is not None)


def form_for(half: bool, on_cpu: bool, sharded: bool) -> Form:
    """Return the form of half or full precision, with or without DeepSpeed."""
    products = 2 if half else 4
    return Form(products if sharded else 4, products, on_cpu)


def estimate_memory(job: Job, sharding: Sharding, rows: int | None = None) -> Estimate:
    """Return the memory of a step with so many rows in a micro-batch; None: those of the job.

    The sum of the parts is the peak if all were held at once. Gradients come while activations go, so for a step
    without accumulation it is an upper bound.

    With P parameters, t of them trained, W ranks and w bytes of a weight (2 in bf16 under DeepSpeed, else 4):

        plan       weights                gradients            optimizer   buffers
        none       4 P + 2 linear         4 t (8 t from 2 ranks)  8 t      -
        stage 1    w P                    4 t                  12 t / W    -
        stage 2    w P                    g t / W              12 t / W    w bucket (two with overlap_comm)
        stage 3    w P / W                g t / W              12 t / W    w bucket, w gathered

    2 linear: autocast's copies of linear layers' weights. 8 t: DDP's buckets are a second copy. 4 t in stage 1:
    DeepSpeed's BF16_Optimizer sums whole float32 gradients. 12: the float32 weights and AdamW's two moments. g: bytes
    of grad_accum_dtype. bucket: reduce_bucket_size. gathered: stage3_max_live_parameters, or P. What is offloaded is in
    host memory, for all ranks of a node.
    """
    rows = job.rows if rows is None else rows
    form = form_of(job, sharding.plan)
    loss = loss_bytes(job, form, rows)
    activations = job.activations[Pass(form, job.checkpointing)].of(rows) if job.activations else 0
    weights, gradients, optimizer, buffers, host = _states(job.student, sharding, form)
    teacher, teacher_host = _teacher(job, sharding, rows, activations + loss)
    return Estimate(weights, gradients, optimizer, teacher, activations, loss, buffers, host + teacher_host)


def fits(estimate: Estimate, capacity: int) -> bool:
    """Return whether an estimate leaves enough of a GPU of so many bytes."""
    return estimate.total + RESERVED <= capacity


def largest_rows(job: Job, sharding: Sharding, capacity: int) -> int:
    """Return the largest micro-batch that fits; 0 if not even one row does, or if the activations are not known."""

    def fitting(rows: int) -> bool:
        return fits(estimate_memory(job, sharding, rows), capacity)

    if not job.activations or not fitting(1):
        return 0
    low, high = 1, 2
    while high <= MOST_ROWS and fitting(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return low


def loss_chunks(job: Job, form: Form, rows: int) -> "Chunks":
    """Return the chunks (rows, wide) of the fused loss of so many rows, as linear_kd takes them on a GPU."""
    from forge.losses.kd_settings import plan_chunks

    N, V, D = rows * job.labels, job.student.columns, job.student.width
    return plan_chunks(N, V, D, **_chunk_options(job, form), **_budget(job))


def loss_bytes(job: Job, form: Form, rows: int) -> int:
    """Return what the loss holds besides the activations: its operator is one that no tensor without memory looks into.

    N labels, V columns, D width. Fused: the scratch memory of plan_chunks, the hidden states at the labels and their
    gradient, the head's gradient, and under autocast the head's copy. Whole logits: as the head gives them, in float32
    for the softmax, its output and its gradient; with a teacher also its logits and a second gradient.
    """
    from forge.losses.kd_settings import plain_rows, scratch_bytes

    sizes, N = job.student, rows * job.labels
    V, D = sizes.columns, sizes.width
    if not job.fused:
        whole = N * V * (2 * form.products + 8 + (0 if form.products == 4 else 4))
        teacher_logits = 0 if job.teacher is None else job.teacher.columns * job.teacher_bytes
        return whole + (N * (teacher_logits + 2 * V * 4) if job.distils else 0)
    gradient = sizes.head * form.weights if sizes.head_trained else 0
    fixed = gradient + N * D * 2 * form.products
    fixed += sizes.head * form.products if form.autocast else 0
    if job.on_cpu:  # the plain path: six tensors of a chunk's logits, and the chunk's share of the head's gradient
        chunk = min(plain_rows(V, 4, **_budget(job)), N)
        return fixed + 6 * chunk * V * 4 + (sizes.head * 4 if sizes.head_trained else 0)
    chunks = loss_chunks(job, form, rows)
    return fixed + scratch_bytes(chunks, N, V, D, **_chunk_options(job, form))


class _ChunkOptions(TypedDict):
    logit_bytes: int
    gradient_bytes: int
    head_gradient_bytes: int


def _chunk_options(job: Job, form: Form) -> _ChunkOptions:
    """logit_bytes as in forge.losses.linear_kd: the difference form for two models in half precision."""
    dense = job.distils and job.teacher is not None and job.placement != "cached"
    differs = dense and form.products == 2 and job.teacher_bytes == 2 and job.loss.precision in (None, "difference")
    logits = 2 if differs else 8 if dense else 4
    if job.loss.precision == "bf16":
        logits = form.products if dense else 0
    head = form.weights if job.student.head_trained else 0
    return {"logit_bytes": logits, "gradient_bytes": form.products, "head_gradient_bytes": head}


class _Budget(TypedDict):
    memory_budget: int | None
    low_memory: bool


def _budget(job: Job) -> _Budget:
    gib = job.loss.memory_budget_gib
    return {"memory_budget": None if gib is None else int(gib * GIB), "low_memory": job.loss.low_memory}


def _states(sizes: ModelSizes, sharding: Sharding, form: Form) -> tuple[int, int, int, int, int]:
    """Return weights, gradients, optimizer and buffers of one GPU, and the host's bytes of one node."""
    plan, W, t = sharding.plan, sharding.ranks, sizes.trained
    weights = round((sizes.parameters - sizes.in_4bit) * form.weights + sizes.in_4bit * IN_4BIT)
    if plan is None:
        copies = (sizes.linear - sizes.in_4bit) * form.products if form.autocast else 0
        return weights + copies, t * (4 if W == 1 else 8), 8 * t, 0, 0
    zero = plan.values["zero_optimization"]
    accumulated = 4 if plan.values.get("data_types", {}).get("grad_accum_dtype") == "fp32" else form.weights
    share, masters = -(-t // W), 12 * -(-t // W)
    gradients = 4 * t if plan.stage == 1 else accumulated * share
    bucket = int(zero.get("reduce_bucket_size", 500_000_000)) * form.weights
    buffers = 0 if plan.stage == 1 else bucket * (2 if plan.stage == 2 and zero.get("overlap_comm") else 1)
    host = 0
    if plan.offloads_optimizer:
        host += (masters + 4 * share) * sharding.ranks_per_node
        masters, gradients = 0, 0
    if plan.stage == 3:
        live = min(int(zero.get("stage3_max_live_parameters", 1_000_000_000)), sizes.parameters)
        buffers += max(live, min(sizes.parameters, sizes.largest_layer + sizes.head)) * form.weights
        weights = -(-weights // W)
        if plan.offloads_weights:
            host += weights * sharding.ranks_per_node
            weights = 0
    return weights, gradients, masters, buffers, host


def _teacher(job: Job, sharding: Sharding, rows: int, of_student: int) -> tuple[int, int]:
    """Return the teacher's bytes on one GPU and on the host of one node.

    replicated: all of it. offload: a layer and the head. zero3: 1/W, a layer and the head. cached: nothing but what the
    cache gives for each label. In addition what its forward holds at most, as far as that is more than the activations
    and the loss of the student (of_student), which come when that forward is over.
    """
    if job.placement == "cached":
        per_label = 12 * job.top_k if job.fused else 4 * job.student.columns
        return rows * job.labels * per_label if job.distils else 0, 0
    sizes, each = job.teacher, job.teacher_bytes
    if sizes is None:
        return 0, 0
    whole, one = sizes.parameters * each, (sizes.largest_layer + sizes.head) * each
    held, host = whole, 0
    if job.placement == "offload":
        held, host = min(whole, one), whole * sharding.ranks_per_node
    if job.placement == "zero3":
        share = -(-whole // sharding.ranks)
        offloads = sharding.teacher_plan is not None and sharding.teacher_plan.offloads_weights
        held = min(whole, (0 if offloads else share) + one)
        host = share * sharding.ranks_per_node if offloads else 0
    hidden = rows * job.labels * sizes.width * each if job.fused else 0
    hidden += job.teacher_layers * rows * job.tokens * sizes.width * each
    return held + hidden + max(0, job.teacher_forward.of(rows) - of_student), host
