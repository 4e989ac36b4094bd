"""What a training step holds on each GPU and on the host under a plan: arithmetic alone, without torch."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypedDict

from forge.config.plans import Plan
from forge.config.schema import LossConfig
from forge.memory.activations import Form, Stack, activation_bytes, forward_bytes, working_bytes

if TYPE_CHECKING:
    from forge.losses.kd_settings import Chunks

GIB = 2**30
IN_4BIT = 0.516  # bytes of an NF4 weight: 0.5, and its constants quantized once more (arXiv 2305.14314, section 3)
# Of each GPU, what none of these numbers holds: CUDA's context, NCCL's buffers and what the allocator cannot use.
RESERVED = 5 * GIB // 2
MOST_ROWS = 1 << 16


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of elements, unless a name says otherwise. A weight that two layers share counts once."""

    architecture: str
    parameters: int
    trained: int
    linear: int  # of the weights of linear layers but the head: what autocast makes copies of
    in_4bit: int  # of frozen weights that are kept in 4 bits
    largest_layer: int  # the parameters of the largest layer of a stack
    head: int  # of the matrix of the logits; 0: none is known
    head_trained: bool
    columns: int  # of the logits
    width: int  # of what the head reads
    stacks: tuple[Stack, ...]  # empty: the model's layers are not in lists, and its activations not known

    @property
    def frozen(self) -> int:
        return self.parameters - self.trained


@dataclass(frozen=True)
class Job:
    """What is trained, whatever the plan."""

    student: ModelSizes
    teacher: ModelSizes | None  # None: there is none
    placement: str  # of the teacher
    teacher_bytes: int  # of a weight of the teacher
    teacher_layers: int  # whose hidden states the student is drawn to
    half: bool  # mixed precision is bf16 or fp16
    on_cpu: bool
    rows: int  # of a micro-batch, the most
    labels: int  # of a row, the most; with whole logits: its positions
    fused: bool  # the loss is computed from hidden states
    distils: bool  # alpha > 0
    top_k: int  # of a cached teacher
    checkpointing: bool
    loss: LossConfig  # how the fused loss is computed


@dataclass(frozen=True)
class Setting:
    """Where it is trained, and how the states are spread."""

    plan: Plan | None  # None: every rank holds all of it, and averages gradients through DDP
    teacher_plan: Plan | None  # of a teacher with the placement zero3
    ranks: int
    ranks_per_node: int


@dataclass(frozen=True)
class Parts:
    """Bytes of one GPU, and of the host of one node."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    loss: int
    buffers: int
    host: int  # of a node; not part of the total

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.host

    def as_gib(self) -> dict[str, float]:
        return {f"{name}_gib": round(value / GIB, 6) for name, value in {**asdict(self), "total": self.total}.items()}


def form_of(job: Job, plan: Plan | None) -> Form:
    """DeepSpeed keeps the weights in bf16 where training computes in it; without it they are float32, under autocast
    where training computes in half precision."""
    half = 2 if job.half else 4
    return Form(4 if plan is None else half, half, job.on_cpu)


def memory_of(job: Job, setting: Setting, rows: int | None = None) -> Parts:
    """The sum of the parts is the peak, as if all were held at once: gradients come while activations go, so that of a
    step without accumulation it is an upper bound.

    With P parameters, t of them trained, W ranks and w bytes of a weight (2 in bf16 under DeepSpeed, else 4):

        plan       weights                gradients            optimizer   buffers
        none       4 P + 2 linear         4 t (8 t from 2 ranks)  8 t      -
        stage 1    w P                    4 t                  12 t / W    -
        stage 2    w P                    g t / W              12 t / W    w bucket (two where overlap_comm)
        stage 3    w P / W                g t / W              12 t / W    w bucket, w gathered

    2 linear: autocast's copies of linear layers' weights; 8 t: DDP's buckets are a second copy. 4 t of stage 1:
    DeepSpeed's BF16_Optimizer sums whole float32 gradients. 12: the float32 weights and AdamW's two moments. g: bytes
    of grad_accum_dtype. bucket: reduce_bucket_size; gathered: stage3_max_live_parameters, or P. What is offloaded is
    the host's, of all ranks of a node.
    """
    rows = job.rows if rows is None else rows
    form = form_of(job, setting.plan)
    loss = loss_bytes(job, form, rows)
    stacks = job.student.stacks
    kept = activation_bytes(stacks, form, rows, checkpointing=job.checkpointing) + working_bytes(stacks, form, rows)
    weights, gradients, optimizer, buffers, host = _states(job.student, setting, form)
    teacher, teacher_host = _teacher(job, setting, rows, kept + loss)
    return Parts(weights, gradients, optimizer, teacher, kept, loss, buffers, host + teacher_host)


def fits(parts: Parts, capacity: int) -> bool:
    """capacity: bytes of a GPU."""
    return parts.total + RESERVED <= capacity


def largest_rows(job: Job, setting: Setting, capacity: int) -> int:
    """The largest micro-batch that fits; 0 where a single row does not."""

    def fitting(rows: int) -> bool:
        return fits(memory_of(job, setting, rows), capacity)

    if not job.student.stacks or not fitting(1):
        return 0
    low, high = 1, 2
    while high <= MOST_ROWS and fitting(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return low


def loss_chunks(job: Job, form: Form, rows: int) -> "Chunks":
    """The chunks (rows, wide) of the fused loss of so many rows, as linear_kd takes them on a GPU."""
    from forge.losses.kd_settings import plan_chunks

    N, V, D = rows * job.labels, job.student.columns, job.student.width
    return plan_chunks(N, V, D, **_chunk_options(job, form), **_budget(job))


def loss_bytes(job: Job, form: Form, rows: int) -> int:
    """N labels, V columns, D width. Fused: scratch of plan_chunks, the hidden states at the labels and their gradient,
    the head's gradient, and under autocast the head's copy. Whole logits: as the head gives them, in float32 for the
    softmax, its output and its gradient; beside a teacher its logits and a second gradient.
    """
    from forge.losses.kd_settings import plain_rows, scratch_bytes

    sizes, N = job.student, rows * job.labels
    V, D = sizes.columns, sizes.width
    if not job.fused:
        whole = N * V * (2 * form.products + 8 + (0 if form.products == 4 else 4))
        of_teacher = N * (job.teacher.columns * job.teacher_bytes + 2 * V * 4) if job.teacher and job.distils else 0
        return whole + of_teacher
    gradient = sizes.head * form.weights if sizes.head_trained else 0
    fixed = gradient + N * D * 2 * form.products
    fixed += sizes.head * form.products if form.autocast else 0
    if job.on_cpu:  # the plain path: some six tensors of a chunk's logits, and the chunk's share of the head's gradient
        chunk = min(plain_rows(V, 4, **_budget(job)), N)
        return fixed + 6 * chunk * V * 4 + (sizes.head * 4 if sizes.head_trained else 0)
    chunks = loss_chunks(job, form, rows)
    return fixed + scratch_bytes(chunks, N, V, D, **_chunk_options(job, form))


class _ChunkOptions(TypedDict):
    logit_bytes: int
    gradient_bytes: int
    head_gradient_bytes: int


def _chunk_options(job: Job, form: Form) -> _ChunkOptions:
    """logit_bytes as forge.losses.linear_kd has them: the difference form for two models in half precision."""
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


def _states(sizes: ModelSizes, setting: Setting, form: Form) -> tuple[int, int, int, int, int]:
    """weights, gradients, optimizer, buffers of one GPU, and the host's bytes of one node."""
    plan, W, t = setting.plan, setting.ranks, sizes.trained
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
        host += (masters + 4 * share) * setting.ranks_per_node
        masters, gradients = 0, 0
    if plan.stage == 3:
        live = min(int(zero.get("stage3_max_live_parameters", 1_000_000_000)), sizes.parameters)
        buffers += max(live, min(sizes.parameters, sizes.largest_layer + sizes.head)) * form.weights
        weights = -(-weights // W)
        if plan.offloads_weights:
            host += weights * setting.ranks_per_node
            weights = 0
    return weights, gradients, masters, buffers, host


def _teacher(job: Job, setting: Setting, rows: int, of_student: int) -> tuple[int, int]:
    """Bytes on one GPU, and on the host of one node. of_student: what its forward and loss need, which come when the
    teacher's forward is done with its own.

    replicated: all of it; offload: a layer and the head; zero3: 1/W, a layer and the head; cached: nothing but what the
    cache gives of each label.
    """
    sizes, each = job.teacher, job.teacher_bytes
    if sizes is None:
        return 0, 0
    if job.placement == "cached":
        of_label = 12 * job.top_k if job.fused else 4 * job.student.columns
        return rows * job.labels * of_label, 0
    whole, one = sizes.parameters * each, (sizes.largest_layer + sizes.head) * each
    held, host = whole, 0
    if job.placement == "offload":
        held, host = min(whole, one), whole * setting.ranks_per_node
    if job.placement == "zero3":
        share = -(-whole // setting.ranks)
        offloads = setting.teacher_plan is not None and setting.teacher_plan.offloads_weights
        held = min(whole, (0 if offloads else share) + one)
        host = share * setting.ranks_per_node if offloads else 0
    hidden = rows * job.labels * sizes.width * each if job.fused else 0
    tokens = max((stack.tokens for stack in sizes.stacks), default=0)
    hidden += job.teacher_layers * rows * tokens * sizes.width * each
    forward = forward_bytes(sizes.stacks, Form(each, each), rows)
    return held + hidden + max(0, forward - of_student), host
