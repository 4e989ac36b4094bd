"""Writes the final model, whole or as an adapter, for from_pretrained to load; merges adapters and proves the merge."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from forge.errors import TrainingError
from forge.model.adapter import merge, put_on_trained
from forge.model.load import read_checkpoint
from forge.model.origin import Origin
from forge.model.source import ModelSource
from forge.model.trained import MODEL_CONFIG, AdapterWeights
from forge.run.files import read_json, write_json

logger = logging.getLogger(__name__)

MERGED = "merged"  # the folder within final/
SHARD = "5GB"  # larger weights are spread over files of that size, which the hub and slow disks take better
# Merged and unmerged, in float32, add the same products in another order. Of the largest logit: 1.3e-6 was seen with 30
# layers; a weight that was left out, or tied where it must not be, is far beyond.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Merge:
    """What becomes of merging an adapter into what it was trained on, measured on a few rows."""

    dtype: str
    rows: int
    largest_logit: float
    largest_difference: float  # of a logit, between the model with its adapter and final/merged as it is loaded
    before_rounding: float  # the same in float32, before the weights took their dtype


def export_model(model: PreTrainedModel, folder: Path, dtype: str) -> None:
    """Saves all weights as safetensors of that dtype, and the model's config, into a new folder."""
    wanted = getattr(torch, dtype)
    if model.dtype == wanted:
        model.save_pretrained(folder, max_shard_size=SHARD)
        return
    cast: dict[int, Tensor] = {}  # by address, so that tied weights stay tied
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in cast:
            cast[tensor.data_ptr()] = tensor.cpu().to(wanted) if tensor.is_floating_point() else tensor.cpu()
        state[name] = cast[tensor.data_ptr()]
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    _say_dtype(folder / MODEL_CONFIG, dtype)


def export_adapter(weights: AdapterWeights, folder: Path) -> None:
    """Saves the adapter as peft does, with the configs of the whole model and with base.json, into a new folder."""
    folder.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.tensors().items()}
    save_file(tensors, folder / weights.file, metadata={"format": "pt"})
    for name, text in weights.texts().items():
        (folder / name).write_text(text)
    if weights.model.can_generate():  # where it stops may not be where its base does
        weights.model.generation_config.save_pretrained(folder)


def export_merged(
    adapter: Path, below: Origin, auto_model: Any, trained: PreTrainedModel, dtype: str, inputs: dict[str, Any]
) -> Merge:
    """Merges the adapter in the folder `adapter` into its base, and writes a whole model into `merged` within it.

    The base is read anew from its own files, on the CPU: nothing of the training is needed but the configs of
    `trained`, and there is one model in memory at a time. inputs: of a few rows, for the model's forward. Raises
    TrainingError where the model that was written does not compute what the model with its adapter does.
    """
    folder = adapter / MERGED
    model = _unmerged(below, auto_model, trained)
    handle, _ = put_on_trained(model, adapter, "model.path")
    wanted = _logits(model, inputs)
    merge(handle)
    merged = _logits(model, inputs)
    _check(merged, wanted, "merging the adapter")
    _round(model, dtype)
    rounded = _logits(model, inputs)
    export_model(model, folder, dtype)
    del model, handle
    loaded = _logits(auto_model.from_pretrained(folder, dtype=torch.float32), inputs)
    _check(loaded, rounded, f"writing the merged model to {folder.name}")
    found = Merge(
        dtype=dtype,
        rows=len(wanted),
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


def push_to_hub(folder: Path, name: str, api: HfApi | None = None) -> bool:
    """Uploads a folder to a private repository of the hub, which is made if there is none. What goes wrong is told
    and loses nothing: the folder stays."""
    api = api or HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Trained with forge")
    except Exception as error:  # noqa: BLE001 - a login, a network, a quota: the run is complete whatever it is
        reason = " ".join(str(error).split())[:200]
        logger.warning("%s could not be uploaded to %s (%s: %s)", folder, name, type(error).__name__, reason)
        logger.warning("upload it later: hf upload %s %s", name, folder)
        return False
    logger.info("uploaded %s to %s", folder, url)
    return True


def _unmerged(below: Origin, auto_model: Any, trained: PreTrainedModel) -> PreTrainedModel:
    """What the adapter was trained on, in float32 on the CPU."""
    config = copy.deepcopy(trained.config)
    if hasattr(config, "quantization_config"):  # of QLoRA: its base is merged as it lies in its files
        del config.quantization_config
    base = below.base
    source = ModelSource(base.name, base.location, base.commit or base.revision, below.adapters, base=base.name)
    model = read_checkpoint(auto_model, source, config, "model", "weights of the base").model
    if trained.can_generate():  # its task may have told it how
        model.generation_config = copy.deepcopy(trained.generation_config)
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    model.eval()
    return torch.nan_to_num(model(**inputs).logits.float())  # padding that attends to nothing may be NaN


def _check(found: Tensor, wanted: Tensor, what: str) -> None:
    difference, largest = (found - wanted).abs().max().item(), wanted.abs().max().item()
    if not difference <= ROUNDING * largest:
        raise TrainingError(
            f"{what} changed the logits by up to {difference:.3g} (the largest is {largest:.3g}), which is more than "
            "rounding; nothing was exported: resume with --set export.merge=false to export the adapter alone"
        )


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: str) -> None:
    """Gives every weight the value that it has in the dtype, in place."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(getattr(torch, dtype)))


def _say_dtype(file: Path, dtype: str) -> None:
    write_json(file, {**read_json(file), "dtype": dtype})
