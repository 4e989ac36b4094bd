"""DeepSpeed: joins the ranks under the plans of a config, prepares models, and gathers sharded weights."""

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

_environment_before: dict[str, str | None] = {}  # by variable that was set for DeepSpeed


def accelerator_of(config: Config) -> Accelerator:
    """Join the ranks, with the models sharded as the config says. Raises UsageError as build_accelerator does."""
    training = config.training
    options: dict[str, Any] = {}
    if config.deepspeed.student is not None:
        options = _deepspeed(config)
    else:
        _refuse_plans_of_the_launcher()
    found = build_accelerator(training.mixed_precision, training.seed, deterministic=training.deterministic, **options)
    _load_whole()
    if config.deepspeed.student is not None:
        logger.info("DeepSpeed: %s", ", ".join(f"{name} {_describe(plan)}" for name, plan in plans_of(found).items()))
    return found


def prepare(accelerator: Accelerator, student: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """Return both as training uses them, on their device. optimizer: of the student's parameters."""
    plans = plans_of(accelerator)
    if _stage(plans.get(STUDENT)) == 3:
        _partition(student, plans[STUDENT], accelerator.device)
    prepared, optimizer = accelerator.prepare(student, optimizer)
    _register_gathering(student)
    return prepared, optimizer


def prepare_teacher(accelerator: Accelerator, teacher: nn.Module) -> nn.Module:
    """Return a frozen model that is sharded over the ranks by the teacher's plan, for forward passes only."""
    with _plan_of_teacher(accelerator):
        _partition(teacher, plans_of(accelerator)[TEACHER], accelerator.device)
        engine = accelerator.prepare(teacher)
    # accelerate keeps what it has prepared, to save it; a teacher is not part of a checkpoint.
    accelerator._models.remove(engine)
    accelerator.deepspeed_engine_wrapped = None  # backward belongs to the student, which is prepared next
    _register_gathering(teacher)
    return engine


def bare(prepared: nn.Module) -> Any:
    """Return the module that was prepared. accelerate's unwrap_model would import DeepSpeed, which takes seconds."""
    return getattr(prepared, "module", prepared)


def clip_grad_norm(accelerator: Accelerator, student: nn.Module, max_norm: float | None) -> Tensor:
    """Clip the gradients to max_norm and return their norm before that, () float32 on the device.

    DeepSpeed has clipped them in backward, as its plan says.
    """
    if not plans_of(accelerator):
        return accelerator.clip_grad_norm_(student.parameters(), max_norm or float("inf"))
    norm = accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm()  # a plain number if it is not finite
    return torch.as_tensor(norm, dtype=torch.float32, device=accelerator.device)


def weights_to_round(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return copies, in host memory, of the weights that the plan would round before the optimizer copies them.

    A plan in bfloat16 rounds the model first and takes the optimizer's float32 weights from that. Call this before
    `prepare`.
    """
    plan = plans_of(accelerator).get(STUDENT)
    if plan is None or not plan["bf16"]["enabled"]:
        return []
    return [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]


def device_to_build_on(accelerator: Accelerator) -> torch.device:
    """Return where a student is built: under ZeRO-3 in host memory, since it may not fit on a device."""
    stage = _stage(plans_of(accelerator).get(STUDENT))
    return torch.device("cpu") if stage == 3 else accelerator.device


def plans_of(accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """Return the configs that DeepSpeed was given, by model; empty without DeepSpeed."""
    plugins = accelerator.state.deepspeed_plugins or {}
    # accelerate disables printing with an infinite number of steps, which is not JSON.
    return {
        name: {key: value for key, value in plugin.hf_ds_config.config.items() if key != "steps_per_print"}
        for name, plugin in plugins.items()
    }


def is_partitioned(parameter: Tensor) -> bool:
    """True if each rank holds only a part of it (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def any_partitioned(module: nn.Module) -> bool:
    return any(is_partitioned(parameter) for parameter in module.parameters())


@contextmanager
def gathered(tensors: Sequence[Tensor], *, modified: bool = False) -> Iterator[None]:
    """Make these weights whole on every rank inside the context; entered on every rank at once.

    modified: what rank 0 writes into them is kept.
    """
    parts = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not parts:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(parts, modifier_rank=0 if modified else None):
        yield


class Gathering(nn.Module):
    """Runs work that reads weights outside their own module's forward.

    The work is a forward of this module, so that sharded weights are gathered for it, forward and backward.
    """

    def __init__(self, *parameters: nn.Parameter | None):
        """parameters: those of other modules that the work reads."""
        super().__init__()
        self._read = [parameter for parameter in parameters if parameter is not None]

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()

    def register(self) -> None:
        """Register the weights, after the model was partitioned."""
        for parameter in filter(is_partitioned, self._read):
            from deepspeed.runtime.zero.partition_parameters import register_external_parameter

            register_external_parameter(self, parameter)


@contextmanager
def _plan_of_teacher(accelerator: Accelerator) -> Iterator[None]:
    """Shard what is prepared inside the context by the teacher's plan."""
    accelerator.state.select_deepspeed_plugin(TEACHER)
    try:
        yield
    finally:
        accelerator.state.select_deepspeed_plugin(STUDENT)
        _load_whole()


def _refuse_plans_of_the_launcher() -> None:
    """Raise UsageError if accelerate would take a plan from the environment, where its config file may have put one."""
    plans = {"ACCELERATE_USE_DEEPSPEED": "zero2", "ACCELERATE_USE_FSDP": "zero3"}
    for variable, plan in plans.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UsageError(
                f"{variable} is set: accelerate's launcher, or its config file, asks for a plan, but forge's config "
                f"decides that; set deepspeed.student: {plan}, and start with `forge launch` or "
                "`accelerate launch --multi_gpu`"
            )


def _register_gathering(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, Gathering):
            part.register()


def _import_deepspeed() -> None:
    """Import DeepSpeed without its logs: it tries the compiler, whose command setuptools logs to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would compile for minutes
    finally:
        logging.disable(before)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # about names that DeepSpeed uses


def _describe(plan: dict[str, Any]) -> str:
    zero = plan["zero_optimization"]
    offloaded = [what for what in ("optimizer", "param") if zero.get(f"offload_{what}", {}).get("device") == "cpu"]
    return f"ZeRO-{zero['stage']}" + (f" with {' and '.join(offloaded)} on the host" if offloaded else "")


def _stage(plan: dict[str, Any] | None) -> int:
    return 0 if plan is None else int(plan["zero_optimization"]["stage"])


def _set(variables: dict[str, str | None]) -> None:
    """Set environment variables, or remove them with None, and note what they were."""
    for name, value in variables.items():
        _environment_before.setdefault(name, os.environ.pop(name, None))
        if value is not None:
            os.environ[name] = value


def restore_environment() -> None:
    """Set the variables that DeepSpeed needed back to what they were: a later run in this process may be without it."""
    for name, value in _environment_before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _environment_before.clear()


def _load_whole() -> None:
    """Let from_pretrained load whole models: with a plan of stage 3 selected it would shard what it reads.

    forge inspects and changes a model before it is sharded.
    """
    unset_hf_deepspeed_config()


def _partition(module: nn.Module, plan: dict[str, Any], device: torch.device) -> None:
    """Leave each rank its part of every weight; only one weight at a time is whole on the device.

    DeepSpeed would do this itself, but with the whole model on the device first.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    if plan["bf16"]["enabled"]:
        round_weights(module, torch.bfloat16)
    Init(module=module, config_dict_or_path=plan)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters in place, but not the buffers.

    With frequencies rounded to bfloat16, a rotary embedding would rotate late tokens by a third of a radian.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _deepspeed(config: Config) -> dict[str, Any]:
    """Return options for the Accelerator. Sets the environment variables that DeepSpeed expects."""
    training, plans = config.training, {STUDENT: config.deepspeed.student}
    if config.teacher.placement == "zero3" and config.wants_teacher:
        plans[TEACHER] = config.deepspeed.teacher
    check_started_ranks()
    # A control run: it has the ranks and plans of its run.
    if AcceleratorState._shared_state.get("deepspeed_plugins"):
        AcceleratorState().select_deepspeed_plugin(STUDENT)
        return {}
    bf16 = resolve_precision(training.mixed_precision) == "bf16"
    backend = None
    if trains_on_cpu():
        # With ACCELERATE_USE_CPU accelerate ignores DeepSpeed, which has its own variable for the CPU.
        _set({"ACCELERATE_USE_CPU": None, "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"})
        backend = "gloo"
    _import_deepspeed()
    if "LOCAL_RANK" not in os.environ:  # DeepSpeed does not support a process without a launcher
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        _set({**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
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
