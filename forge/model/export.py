"""Writes whole models for from_pretrained to load, merges adapters with a proof that it went well, and uploads."""

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from forge.errors import TrainingError
from forge.model.adapter import config_of_base, load_adapter, merge
from forge.model.load import AutoModelClass, not_pooler, read_checkpoint
from forge.model.origin import Origin
from forge.model.source import ModelSource
from forge.run.files import read_json, write_json
from forge.run.metadata import Merged

logger = logging.getLogger(__name__)

MERGED = "merged"  # the folder within final/
MODEL_CONFIG = "config.json"
SHARD = "5GB"  # larger weights are spread over files of this size, which the hub and slow disks handle better
# How far logits may be off, relative to the largest one. In float32 the same products are added in another order:
# 1.3e-6 was seen with 30 layers; a weight that was left out, or tied by mistake, causes far more. Weights of 8 and of
# 11 bits are off by at most 0.4 % and 0.05 % each, which adds up over the layers.
ROUNDING = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.2}
ROUNDING_OF_GPU = 0.02  # float32 may multiply in TF32 there, which has 11 bits


@dataclass(frozen=True)
class MergeProof:
    """A few rows on which a merged model must compute what the trained model does."""

    auto_model: AutoModelClass
    inputs: dict[str, Any]  # keyword arguments of the model's forward
    counted: Tensor | None = None  # the logits that are learned, a mask of all dimensions but the last; None: all
    trained_logits: Tensor | None = None  # (N, V) f32, from model_logits; required if one rank cannot run the model


def export_model(model: PreTrainedModel, folder: Path, dtype: str, state: dict[str, Tensor] | None = None) -> None:
    """Save all weights as safetensors of one dtype, with the model's config, to a new folder.

    Args:
        state: for a model that is sharded, its whole weights on the CPU, in that dtype.
    """
    if state is not None:
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
        _record_dtype(folder / MODEL_CONFIG, dtype)
        return
    if model.dtype == getattr(torch, dtype):
        model.save_pretrained(folder, max_shard_size=SHARD)
        return
    rounded: dict[int, Tensor] = {}  # by address, so that tied weights stay tied
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in rounded:
            on_cpu = tensor.cpu()
            rounded[tensor.data_ptr()] = cast_weight(on_cpu, dtype, name) if tensor.is_floating_point() else on_cpu
        state[name] = rounded[tensor.data_ptr()]
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    _record_dtype(folder / MODEL_CONFIG, dtype)


def export_merged(adapter: Path, base: Origin, trained: PreTrainedModel, dtype: str, proof: MergeProof) -> Merged:
    """Merge the adapter in the folder `adapter` into its base, and write the whole model to `merged` within it.

    The base is read from its own files again, on the CPU, and the result is compared with the trained model.

    Args:
        base: the files that the adapter was trained on.
        trained: the model at the end of training, with its adapter.

    Raises:
        TrainingError: the written model does not compute what the trained model does.
    """

    def logits(model: PreTrainedModel) -> Tensor:  # (N, V) f32
        return model_logits(model, proof)

    folder = adapter / MERGED
    handle = _unmerged(adapter, base, trained, proof.auto_model)
    model = cast(PreTrainedModel, handle.get_base_model())
    if not getattr(trained, "is_quantized", False):  # 4 bits are far from the base's own weights
        expected = logits(trained) if proof.trained_logits is None else proof.trained_logits
        _check(logits(model), expected, "reading base and adapter again", _rounding_on(trained))
    unmerged = logits(model)
    merge(handle)
    merged = logits(model)
    _check(merged, unmerged, "merging the adapter", ROUNDING["float32"])
    _round(model, dtype)
    rounded = logits(model)
    _check(rounded, merged, f"rounding to {dtype}", ROUNDING[dtype])
    export_model(model, folder, dtype)
    del model, handle
    loaded = logits(proof.auto_model.from_pretrained(folder, dtype=torch.float32))
    _check(loaded, rounded, f"writing the merged model to {folder.name}", ROUNDING["float32"])
    measured = Merged(
        dtype=dtype,
        rows=len(next(iter(proof.inputs.values()))),
        largest_logit=unmerged.abs().max().item(),
        largest_difference=(loaded - unmerged).abs().max().item(),
        before_rounding=(merged - unmerged).abs().max().item(),
    )
    logger.info(
        "merged the adapter into its base in %s: on %d rows the logits differ by at most %.2g (the largest is %.3g)",
        dtype,
        measured.rows,
        measured.largest_difference,
        measured.largest_logit,
    )
    return measured


@torch.no_grad()
def model_logits(model: PreTrainedModel, proof: MergeProof) -> Tensor:
    """Return the counted logits of the proof's rows, (N, V) f32 on the CPU; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    inputs = {
        name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in proof.inputs.items()
    }
    logits = model(**inputs).logits.float().cpu()
    model.train(was_training)
    # Positions that are padding, or only read, may hold anything: NaN where they attend to nothing.
    return logits.flatten(0, -2) if proof.counted is None else logits[proof.counted.cpu()]


def cast_weight(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """Return the weight in that dtype. Raises TrainingError if a value is beyond its range: float16 ends at 65504."""
    rounded = tensor.to(getattr(torch, dtype))
    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise TrainingError(
            f"{name} holds {tensor.abs().max().item():.3g}, which is out of range for {dtype}; nothing was exported. "
            "Resume with --set export.dtype=bfloat16, or float32"
        )
    return rounded


def push_to_hub(folder: Path, name: str, api: HfApi | None = None) -> bool:
    """Upload a folder to a private repository of the hub, created if it does not exist; never to a public one.

    Returns False, with a warning, if the upload fails: the folder is still there.
    """
    api = api or HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        if not api.repo_info(url.repo_id).private:  # it existed before
            raise PermissionError("the repository is public, and forge uploads to private ones only")
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Trained with forge")
    except Exception as error:  # noqa: BLE001 - a login, a network, a quota: the run is complete in any case
        reason = " ".join(str(error).split())[:200]
        logger.warning("%s could not be uploaded to %s (%s: %s)", folder, name, type(error).__name__, reason)
        logger.warning("upload it later: hf upload %s %s", name, folder)
        return False
    logger.info("uploaded %s to %s", folder, url)
    return True


def _unmerged(adapter: Path, origin: Origin, trained: PreTrainedModel, auto_model: AutoModelClass) -> PeftModel:
    """Read what was trained from its files, in float32 on the CPU: base, adapters merged before, and this adapter."""
    config = config_of_base(trained)
    if hasattr(config, "quantization_config"):  # QLoRA: its base is merged with the weights that its files hold
        del config.quantization_config
    base = origin.base
    source = ModelSource(base.name, base.location, base.commit or base.revision, origin.adapters, base=base.name)
    read = read_checkpoint(auto_model, source, config, "model", "weights of the base")
    handle, in_full = load_adapter(read.model, adapter, "model.path")
    if missing := sorted({*not_pooler(read.missing)} - in_full):
        raise TrainingError(
            f"neither {base.name} nor the adapter has {missing[0]} ({len(missing)} weights in all), which a merged "
            "model needs; nothing was exported. Resume with --set export.merge=false to export the adapter alone"
        )
    if trained.can_generate():  # its task may have changed it
        read.model.generation_config = copy.deepcopy(trained.generation_config)
    return handle


def _rounding_on(trained: PreTrainedModel) -> float:
    if trained.dtype == torch.bfloat16:  # DeepSpeed plans may compute in it
        return ROUNDING["bfloat16"]
    return ROUNDING["float32"] if trained.device.type == "cpu" and trained.dtype == torch.float32 else ROUNDING_OF_GPU


def _check(found: Tensor, expected: Tensor, what: str, rounding: float) -> None:
    """Raise TrainingError if the two differ by more than `rounding` of the largest logit, or are not finite."""
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= rounding * largest < math.inf:  # false for NaN too
        raise TrainingError(
            f"{what} changed the logits by up to {difference:.3g} (the largest is {largest:.3g}), which is more than "
            "rounding; nothing was exported. Resume with --set export.merge=false to export the adapter alone"
        )


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: str) -> None:
    """Round every weight to what it is in that dtype, in place."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(cast_weight(tensor, dtype, name))


def _record_dtype(file: Path, dtype: str) -> None:
    write_json(file, {**read_json(file), "dtype": dtype})
