"""DeepSpeed: the ranks joined under the plans of a config, and what a sharded model needs from those who use it."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from forge.cluster.launch import free_port
from forge.config.plans import filled, read_plan
from forge.config.schema import Config
from forge.errors import UsageError
from forge.ranks.accelerator import build_accelerator, check_started_ranks, resolve_precision, trains_on_cpu

logger = logging.getLogger(__name__)

STUDENT, TEACHER = "student", "teacher"


def accelerator_of(config: Config) -> Accelerator:
    """Joins the ranks as the config wants the models sharded. Raises UsageError as build_accelerator does."""
    training = config.training
    options: dict[str, Any] = {}
    if config.deepspeed.student is not None:
        options = _deepspeed(config)
    else:
        _refuse_plans_of_the_launcher()
    found = build_accelerator(training.mixed_precision, training.seed, deterministic=training.deterministic, **options)
    _load_whole()
    if config.deepspeed.student is not None:
        logger.info("DeepSpeed: %s", ", ".join(f"{name} {_told(plan)}" for name, plan in plans_of(found).items()))
    return found


def prepare(accelerator: Accelerator, student: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """Both as training uses them, on their device. optimizer: of the student's parameters."""
    plans = plans_of(accelerator)
    if _stage(plans.get(STUDENT)) == 3:
        _partition(student, plans[STUDENT], accelerator.device)
    prepared, optimizer = accelerator.prepare(student, optimizer)
    _tell(student)
    return prepared, optimizer


def prepare_teacher(accelerator: Accelerator, teacher: nn.Module) -> nn.Module:
    """A frozen model spread over the ranks by the teacher's plan, for forwards alone."""
    with _plan_of_teacher(accelerator):
        _partition(teacher, plans_of(accelerator)[TEACHER], accelerator.device)
        engine = accelerator.prepare(teacher)
    # accelerate holds what it has prepared, to save it; a teacher is no part of any checkpoint.
    accelerator._models.remove(engine)
    accelerator.deepspeed_engine_wrapped = None  # backward is the student's, which is prepared next
    _tell(teacher)
    return engine


def bare(prepared: nn.Module) -> Any:
    """The module that was prepared. accelerate's unwrap_model imports DeepSpeed to tell, which takes seconds."""
    return getattr(prepared, "module", prepared)


def clip_grad_norm(accelerator: Accelerator, student: nn.Module, max_norm: float | None) -> Tensor:
    """The norm of the step's gradients, before they are clipped to max_norm: () on the device. DeepSpeed has clipped by
    its plan, in backward."""
    if not plans_of(accelerator):
        return accelerator.clip_grad_norm_(student.parameters(), max_norm or float("inf"))
    norm = accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm()  # a number, where it is not finite
    return torch.as_tensor(norm, dtype=torch.float32, device=accelerator.device)


def weights_to_round(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Before they are prepared: copies, in host memory, of those that a plan in bfloat16 would round before its
    optimizer takes its float32 weights from them."""
    plan = plans_of(accelerator).get(STUDENT)
    if plan is None or not plan["bf16"]["enabled"]:
        return []
    return [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]


def device_to_build_on(accelerator: Accelerator) -> torch.device:
    """Where a student waits until it is prepared: under ZeRO-3 in host memory, for it may be larger than a device."""
    stage = _stage(plans_of(accelerator).get(STUDENT))
    return torch.device("cpu") if stage == 3 else accelerator.device


def plans_of(accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """DeepSpeed's configs as they were given to it, by model; empty without it."""
    plugins = accelerator.state.deepspeed_plugins or {}
    # accelerate's own way of never printing is an infinite number of steps, which is no JSON.
    return {
        name: {key: value for key, value in plugin.hf_ds_config.config.items() if key != "steps_per_print"}
        for name, plugin in plugins.items()
    }


def is_partitioned(parameter: Tensor) -> bool:
    """Does each rank hold a part of it only (ZeRO-3)?"""
    return hasattr(parameter, "ds_id")


def any_partitioned(module: nn.Module) -> bool:
    return any(is_partitioned(parameter) for parameter in module.parameters())


@contextmanager
def gathered(tensors: Sequence[Tensor], *, modified: bool = False) -> Iterator[None]:
    """Inside, every rank has these weights whole, to be read; with modified, those that rank 0 leaves count then. On
    every rank at once."""
    parts = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not parts:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(parts, modifier_rank=0 if modified else None):
        yield


class Gathering(nn.Module):
    """Runs what reads weights outside their own module's forward: as a forward of this module, so that whoever shards
    weights gathers them for it, forwards and backwards."""

    def __init__(self, *parameters: nn.Parameter | None):
        """parameters: which `work` reads, of other modules."""
        super().__init__()
        self._read = [parameter for parameter in parameters if parameter is not None]

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()

    def tell(self) -> None:
        """After the model was partitioned."""
        for parameter in filter(is_partitioned, self._read):
            from deepspeed.runtime.zero.partition_parameters import register_external_parameter

            register_external_parameter(self, parameter)


@contextmanager
def _plan_of_teacher(accelerator: Accelerator) -> Iterator[None]:
    """What is prepared inside is sharded by the teacher's plan."""
    accelerator.state.select_deepspeed_plugin(TEACHER)
    try:
        yield
    finally:
        accelerator.state.select_deepspeed_plugin(STUDENT)
        _load_whole()


def _refuse_plans_of_the_launcher() -> None:
    """accelerate takes plans from the environment too, where its own config file was made with one."""
    plans = {"ACCELERATE_USE_DEEPSPEED": "zero2", "ACCELERATE_USE_FSDP": "zero3"}
    for variable, plan in plans.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UsageError(
                f"{variable} is set: accelerate's launcher, or its config file, asks for a plan, and forge's config "
                f"decides that; set deepspeed.student: {plan}, and launch with `forge launch`, or with "
                "`accelerate launch --multi_gpu`"
            )


def _tell(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, Gathering):
            part.tell()


def _import_deepspeed() -> None:
    """Without what it tells of itself meanwhile: it tries the compiler, whose command setuptools logs as the root."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it is compiled first, for minutes
    finally:
        logging.disable(before)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of names that DeepSpeed calls


def _told(plan: dict[str, Any]) -> str:
    zero = plan["zero_optimization"]
    offloaded = [what for what in ("optimizer", "param") if zero.get(f"offload_{what}", {}).get("device") == "cpu"]
    return f"ZeRO-{zero['stage']}" + (f" with {' and '.join(offloaded)} on the host" if offloaded else "")


def _stage(plan: dict[str, Any] | None) -> int:
    return 0 if plan is None else int(plan["zero_optimization"]["stage"])


def _load_whole() -> None:
    """from_pretrained must not shard what it reads, as it does once a plan of stage 3 is selected: forge looks at a
    model, and changes it, before that is done."""
    unset_hf_deepspeed_config()


def _partition(module: nn.Module, plan: dict[str, Any], device: torch.device) -> None:
    """Leaves each rank its part of every weight; only one weight at a time is whole on the device.

    DeepSpeed would do so itself, with all of the model on the device before.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    if plan["bf16"]["enabled"]:
        round_weights(module, torch.bfloat16)
    Init(module=module, config_dict_or_path=plan)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """In place. Not the buffers: with its frequencies rounded to bfloat16, a rotary embedding turns late tokens by a
    third of a radian."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _deepspeed(config: Config) -> dict[str, Any]:
    """Options of the Accelerator. Changes the environment into the one that DeepSpeed expects."""
    training, plans = config.training, {STUDENT: config.deepspeed.student}
    if config.teacher.placement == "zero3" and config.wants_teacher:
        plans[TEACHER] = config.deepspeed.teacher
    check_started_ranks()
    # The control of a run: its ranks and plans are those of the run.
    if AcceleratorState._shared_state.get("deepspeed_plugins"):
        AcceleratorState().select_deepspeed_plugin(STUDENT)
        return {}
    bf16 = resolve_precision(training.mixed_precision) == "bf16"
    backend = None
    if trains_on_cpu():
        # ACCELERATE_USE_CPU would keep accelerate from DeepSpeed, which has a word of its own for it.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
        backend = "gloo"
    _import_deepspeed()
    if "LOCAL_RANK" not in os.environ:  # DeepSpeed knows no process that is alone
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = int(os.environ["WORLD_SIZE"])
    rows_per_step, micro_batches = training.step_shape(ranks)
    rows = math.ceil(rows_per_step / (ranks * micro_batches))
    plugins = {}
    for name, plan in plans.items():
        assert plan is not None
        values = filled(
            read_plan(plan),
            ranks=ranks,
            micro_batches=micro_batches,
            rows=rows,
            max_grad_norm=(training.max_grad_norm or 0.0) if name == STUDENT else 0.0,
            bf16=bf16 if name == STUDENT or config.teacher.dtype == "auto" else config.teacher.dtype == "bfloat16",
        )
        plugins[name] = DeepSpeedPlugin(hf_ds_config=values, zero3_init_flag=False)
    return {"deepspeed_plugins": plugins, "kwargs_handlers": [InitProcessGroupKwargs(backend=backend)]}
