"""Writes the final model, whole or as an adapter, for from_pretrained to load; merges adapters and proves the merge."""

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from forge.errors import TrainingError
from forge.model.adapter import config_below, merge, put_on_trained
from forge.model.load import not_pooler, read_checkpoint
from forge.model.origin import Origin
from forge.model.source import ModelSource
from forge.model.trained import MODEL_CONFIG, AdapterWeights
from forge.run.files import read_json, write_json

logger = logging.getLogger(__name__)

MERGED = "merged"  # the folder within final/
SHARD = "5GB"  # larger weights are spread over files of that size, which the hub and slow disks take better
# How far logits may be off, of the largest one. In float32 the same products are added in another order: 1.3e-6 was
# seen with 30 layers; a weight that was left out, or tied where it must not be, is far beyond. Weights of 8 and of 11
# bits are off by 0.4 % and 0.05 % at most each, which adds up over the layers.
ROUNDING = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.2}
ROUNDING_OF_GPU = 0.02  # float32 there may multiply in TF32, which has 11 bits


@dataclass(frozen=True)
class Merge:
    """What becomes of merging an adapter into what it was trained on, measured on a few rows."""

    dtype: str
    rows: int
    largest_logit: float
    largest_difference: float  # of a logit, between the model with its adapter and final/merged as it is loaded
    before_rounding: float  # the same in float32, before the weights took their dtype


def export_model(model: PreTrainedModel, folder: Path, dtype: str, state: dict[str, Tensor] | None = None) -> None:
    """Saves all weights as safetensors of that dtype, and the model's config, into a new folder. state: whole weights
    on the CPU, in that dtype, of a model that is sharded."""
    if state is not None:
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
        _say_dtype(folder / MODEL_CONFIG, dtype)
        return
    wanted = getattr(torch, dtype)
    if model.dtype == wanted:
        model.save_pretrained(folder, max_shard_size=SHARD)
        return
    rounded: dict[int, Tensor] = {}  # by address, so that tied weights stay tied
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in rounded:
            on_cpu = tensor.cpu()
            rounded[tensor.data_ptr()] = in_dtype(on_cpu, dtype, name) if tensor.is_floating_point() else on_cpu
        state[name] = rounded[tensor.data_ptr()]
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    _say_dtype(folder / MODEL_CONFIG, dtype)


def export_adapter(weights: AdapterWeights, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Saves the adapter as peft does, with the configs of the whole model and with base.json, into a new folder. state:
    its whole weights on the CPU, of a model that is sharded."""
    folder.mkdir()
    whole = weights.tensors() if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
    save_file(tensors, folder / weights.file, metadata={"format": "pt"})
    for name, text in weights.texts().items():
        (folder / name).write_text(text)
    if weights.model.can_generate():  # where it stops may not be where its base does
        weights.model.generation_config.save_pretrained(folder)


def export_merged(
    adapter: Path,
    below: Origin,
    auto_model: Any,
    trained: PreTrainedModel,
    dtype: str,
    inputs: dict[str, Any],
    counted: Tensor | None = None,
    logits_of_trained: Tensor | None = None,
) -> Merge:
    """Merges the adapter in the folder `adapter` into its base, and writes a whole model into `merged` within it.

    The base is read anew from its own files, on the CPU, and what comes of it is compared with `trained`, the model
    that the training ended with. inputs: of a few rows, for the model's forward. counted: which of their logits are
    learned, a mask over all dimensions but the last; None: all. logits_of_trained: as model_logits gives them, of a
    model that one rank cannot run alone. Raises TrainingError where the model that was written does not compute what
    the trained model does.
    """

    def logits(model: PreTrainedModel) -> Tensor:  # (N, V) f32
        return model_logits(model, inputs, counted)

    folder = adapter / MERGED
    handle = _unmerged(below, auto_model, trained, adapter)
    model = cast(PreTrainedModel, handle.get_base_model())
    if not getattr(trained, "is_quantized", False):  # 4 bits are far from the base's own weights
        wanted = logits(trained) if logits_of_trained is None else logits_of_trained
        _check(logits(model), wanted, "reading base and adapter anew", _rounding_on(trained))
    wanted = logits(model)
    merge(handle)
    merged = logits(model)
    _check(merged, wanted, "merging the adapter", ROUNDING["float32"])
    _round(model, dtype)
    rounded = logits(model)
    _check(rounded, merged, f"rounding to {dtype}", ROUNDING[dtype])
    export_model(model, folder, dtype)
    del model, handle
    loaded = logits(auto_model.from_pretrained(folder, dtype=torch.float32))
    _check(loaded, rounded, f"writing the merged model to {folder.name}", ROUNDING["float32"])
    found = Merge(
        dtype=dtype,
        rows=len(next(iter(inputs.values()))),
        largest_logit=wanted.abs().max().item(),
        largest_difference=(loaded - wanted).abs().max().item(),
        before_rounding=(merged - wanted).abs().max().item(),
    )
    logger.info(
        "merged adapter and base in %s: on %d rows the logits differ by at most %.2g (the largest is %.3g)",
        dtype,
        found.rows,
        found.largest_difference,
        found.largest_logit,
    )
    return found


@torch.no_grad()
def model_logits(model: PreTrainedModel, inputs: dict[str, Any], counted: Tensor | None) -> Tensor:
    """(N, V) f32, on the CPU; the model's mode stays as it was."""
    was_training = model.training
    model.eval()
    placed = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    logits = model(**placed).logits.float().cpu()
    model.train(was_training)
    # What is padded, or only read, may hold anything: NaN where it attends to nothing.
    return logits.flatten(0, -2) if counted is None else logits[counted.cpu()]


def in_dtype(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """The weight in that dtype. Raises TrainingError where it does not fit in: float16 ends at 65504."""
    rounded = tensor.to(getattr(torch, dtype))
    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise TrainingError(
            f"{name} holds {tensor.abs().max().item():.3g}, which is beyond {dtype}; nothing was exported: resume with "
            "--set export.dtype=bfloat16, or float32"
        )
    return rounded


def push_to_hub(folder: Path, name: str, api: HfApi | None = None) -> bool:
    """Uploads a folder to a private repository of the hub, which is made if there is none; never to a public one. What
    goes wrong is told and loses nothing: the folder stays."""
    api = api or HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        if not api.repo_info(url.repo_id).private:  # it was there before
            raise PermissionError("the repository is public, and forge uploads to private ones only")
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Trained with forge")
    except Exception as error:  # noqa: BLE001 - a login, a network, a quota: the run is complete whatever it is
        reason = " ".join(str(error).split())[:200]
        logger.warning("%s could not be uploaded to %s (%s: %s)", folder, name, type(error).__name__, reason)
        logger.warning("upload it later: hf upload %s %s", name, folder)
        return False
    logger.info("uploaded %s to %s", folder, url)
    return True


def _unmerged(below: Origin, auto_model: Any, trained: PreTrainedModel, adapter: Path) -> PeftModel:
    """What was trained, in float32 on the CPU, out of its files: the base, what was merged into it, and the adapter."""
    config = config_below(trained)
    if hasattr(config, "quantization_config"):  # of QLoRA: its base is merged as it lies in its files
        del config.quantization_config
    base = below.base
    source = ModelSource(base.name, base.location, base.commit or base.revision, below.adapters, base=base.name)
    read = read_checkpoint(auto_model, source, config, "model", "weights of the base")
    handle, in_full = put_on_trained(read.model, adapter, "model.path")
    if lost := sorted({*not_pooler(read.missing)} - in_full):
        raise TrainingError(
            f"neither {base.name} nor the adapter holds {lost[0]} ({len(lost)} weights in all), which a merged model "
            "needs; nothing was exported: resume with --set export.merge=false to export the adapter alone"
        )
    if trained.can_generate():  # its task may have told it how
        read.model.generation_config = copy.deepcopy(trained.generation_config)
    return handle


def _rounding_on(trained: PreTrainedModel) -> float:
    if trained.dtype == torch.bfloat16:  # of DeepSpeed, whose plans compute in it
        return ROUNDING["bfloat16"]
    return ROUNDING["float32"] if trained.device.type == "cpu" and trained.dtype == torch.float32 else ROUNDING_OF_GPU


def _check(found: Tensor, wanted: Tensor, what: str, rounding: float) -> None:
    """Raises TrainingError where the two differ by more than `rounding` of the largest logit, or are not finite."""
    difference, largest = (found - wanted).abs().max().item(), wanted.abs().max().item()
    if not difference <= rounding * largest < math.inf:  # false for NaN too
        raise TrainingError(
            f"{what} changed the logits by up to {difference:.3g} (the largest is {largest:.3g}), which is more than "
            "rounding; nothing was exported: resume with --set export.merge=false to export the adapter alone"
        )


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: str) -> None:
    """Gives every weight the value that it has in the dtype, in place."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(in_dtype(tensor, dtype, name))


def _say_dtype(file: Path, dtype: str) -> None:
    write_json(file, {**read_json(file), "dtype": dtype})
