"""Finds DeepSpeed plans by name, reads them, compares them with the config, and fills them in from the config."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.config.shipped import shipped_folder

FOLDER = shipped_folder("ds_configs")
AUTO = "auto"
TEACHER_PREFIX = "teacher_"
# Sections of a DeepSpeed config that forge's own keys decide.
FROM_CONFIG = {
    "optimizer": "training.learning_rate, training.weight_decay and training.adam_*",
    "scheduler": "training.schedule and training.warmup_ratio",
    "amp": "training.mixed_precision",
    "fp16": "training.mixed_precision",
}


# The keys that checkpoints, export and the loop support. Others change where DeepSpeed keeps a tensor (as
# round_robin_gradients does) or its precision, and forge would silently save or export wrong numbers.
OFFLOAD = {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"}
SECTIONS = {
    "bf16": {"enabled"},
    "data_types": {"grad_accum_dtype"},
    "zero_optimization": {
        *("stage", "offload_param", "offload_optimizer", "overlap_comm", "contiguous_gradients", "reduce_scatter"),
        *("reduce_bucket_size", "allgather_partitions", "allgather_bucket_size", "sub_group_size"),
        *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold"),
        *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "memory_efficient_linear"),
    },
}
TOP = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "zero_force_ds_cpu_optimizer"),
    *("zero_allow_untested_optimizer", "wall_clock_breakdown", "comms_logger", "flops_profiler"),
}


class PlanError(ValueError):
    """The reason why a plan cannot be used, and what to do."""


@dataclass(frozen=True)
class Plan:
    """One DeepSpeed config, as in its file."""

    name: str
    file: Path
    values: dict[str, Any]

    @property
    def stage(self) -> int:
        """The ZeRO stage: 1 shards the optimizer state, 2 also the gradients, 3 also the weights."""
        return int(self.values["zero_optimization"]["stage"])

    @property
    def offloads_optimizer(self) -> bool:
        """True if the optimizer state is in host memory or on disk."""
        return _offloads(self.values, "offload_optimizer")

    @property
    def offloads_weights(self) -> bool:
        """True if the weights are in host memory or on disk."""
        return _offloads(self.values, "offload_param")


def plan_names(teacher: bool = False) -> list[str]:
    """Return the names of the plans in ds_configs/, for students or for teachers."""
    names = sorted(file.stem for file in FOLDER.glob("*.json"))
    return [name for name in names if name.startswith(TEACHER_PREFIX) == teacher]


def is_file(name: str) -> bool:
    """True if it is the path of a user's own file, not the name of a plan in ds_configs/."""
    return name.endswith(".json") or "/" in name


def read_plan(name: str) -> Plan:
    """Read the plan with that name in ds_configs/, or of a path. Raises PlanError."""
    file = Path(name).expanduser() if is_file(name) else FOLDER / f"{name}.json"
    try:
        text = file.read_text(encoding="utf-8-sig")  # with or without the mark that some editors put first
    except OSError as error:
        if is_file(name):
            raise PlanError(f"{file} cannot be read ({error.strerror})") from error
        known = ", ".join([*plan_names(), *plan_names(teacher=True)])
        raise PlanError(f"no such plan; ds_configs/ has {known}, and the path of a file ends in .json") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{file} is not a text file") from error
    try:
        values = json.loads(text)
    except ValueError as error:
        raise PlanError(f"{file} is not JSON ({error})") from error
    zero = values.get("zero_optimization") if isinstance(values, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        raise PlanError(f"{file} must be a map with zero_optimization.stage 1, 2 or 3, got stage {stage!r}")
    _check_keys(file, values)
    return Plan(name, file, values)


def contradictions(plan: Plan, config: Any, key: str) -> list[str]:
    """Return sentences about what a plan and the config disagree on. key: the config key that names the plan."""
    teacher, training, found = key == "deepspeed.teacher", config.training, []
    if not teacher and plan.file.parent == FOLDER and plan.name.startswith(TEACHER_PREFIX):
        found.append(f"{key} is {plan.name}, a plan for teachers; use one of {', '.join(plan_names())}")
    if teacher and plan.stage != 3:
        found.append(f"{key} is {plan.name}, of stage {plan.stage}, but only stage 3 shards weights; use teacher_zero3")
    zero = plan.values["zero_optimization"]
    for offload in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(offload), dict) and zero[offload].get("device") == "nvme":
            found.append(f"{plan.file} has {offload}.device nvme, which forge cannot checkpoint; set it to cpu")
    for name, ours in FROM_CONFIG.items():
        section = plan.values.get(name)
        if section is not None and not (isinstance(section, dict) and section.get("enabled") in (False, AUTO)):
            found.append(f"{plan.file} has {name}, but {ours} decide that; remove it from the file")
    wanted: dict[str, Any] = {"gradient_clipping": 0.0 if teacher else training.max_grad_norm or 0.0}
    of_config = {
        "gradient_clipping": "training.max_grad_norm",
        "train_micro_batch_size_per_gpu": "training.per_device_batch_size",
        "gradient_accumulation_steps": "training.gradient_accumulation_steps",
        "train_batch_size": "training.batch_size",
    }
    if not teacher:
        wanted["train_micro_batch_size_per_gpu"] = training.per_device_batch_size
        if training.batch_size is None:
            wanted["gradient_accumulation_steps"] = training.gradient_accumulation_steps
        else:
            wanted["train_batch_size"] = training.batch_size
    follows = "train_batch_size" if training.batch_size is None else "gradient_accumulation_steps"
    if not teacher and plan.values.get(follows, AUTO) != AUTO:
        found.append(
            f"{plan.file} has {follows} {plan.values[follows]}, but that follows from the config and the ranks; "
            "set it to auto in the file"
        )
    for name, ours in wanted.items():
        said = plan.values.get(name, AUTO)
        if said not in (AUTO, ours):
            found.append(f"{plan.file} has {name} {said}, but {of_config[name]} is {ours}; set it to auto in the file")
    bf16 = plan.values.get("bf16", {}).get("enabled", AUTO)
    name, precision = "training.mixed_precision", training.mixed_precision
    if teacher and config.teacher.dtype != AUTO:
        name, precision = "teacher.dtype", config.teacher.dtype
    if bf16 != AUTO and precision != AUTO and bool(bf16) != (precision in ("bf16", "bfloat16")):
        found.append(
            f"{plan.file} has bf16.enabled {str(bf16).lower()}, but {name} is {precision}; set it to auto in the file"
        )
    return found


def _check_keys(file: Path, values: dict[str, Any]) -> None:
    """Raise PlanError for a key that forge does not support, and for a section that is not a map."""
    zero = values["zero_optimization"]
    offloads = {
        f"zero_optimization.{name}": (zero.get(name), OFFLOAD) for name in ("offload_param", "offload_optimizer")
    }
    sections = {name: (values.get(name), known) for name, known in SECTIONS.items()} | offloads
    for name, (section, known) in sections.items():
        if section is None:
            continue
        if not isinstance(section, dict):
            raise PlanError(f"{file} has {name} {section!r}, but it must be a map, as DeepSpeed defines it")
        if strange := [key for key in section if key not in known]:
            raise PlanError(f"{file} has {name}.{strange[0]}, which forge does not support; remove it")
    if strange := [key for key in values if key not in TOP and key not in SECTIONS and key not in FROM_CONFIG]:
        raise PlanError(f"{file} has {strange[0]}, which forge does not support; remove it")


def filled(
    plan: Plan, *, ranks: int, micro_batches: int, rows: int, max_grad_norm: float, bf16: bool
) -> dict[str, Any]:
    """Return the plan for DeepSpeed, with every auto of batch, clipping and precision replaced.

    Args:
        rows: the most rows of a micro-batch; DeepSpeed only multiplies them.
        max_grad_norm: 0 for no clipping.
    """
    values = copy.deepcopy(plan.values)
    values |= {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": rows * micro_batches * ranks,
        "gradient_clipping": max_grad_norm,
        "bf16": {**values.get("bf16", {}), "enabled": bf16},
    }
    if not bf16:  # there is only one dtype, and DeepSpeed refuses the section
        values.pop("data_types", None)
    if plan.offloads_optimizer:  # torch's AdamW, as without a plan: DeepSpeed's own would be compiled on first use
        values["zero_force_ds_cpu_optimizer"] = False
    return values


def _offloads(values: dict[str, Any], what: str) -> bool:
    section = values["zero_optimization"].get(what)
    return isinstance(section, dict) and section.get("device", "none") != "none"
