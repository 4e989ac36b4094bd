"""Exports the final model of a run with its tokenizer or processor, and checks a merged one against its adapter."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from forge.attempt.attempt import Attempt
from forge.checkpoint.contents import Training
from forge.checkpoint.shards import PROJECTIONS
from forge.data.batches import model_inputs
from forge.errors import TrainingError
from forge.losses.cross_entropy import IGNORE
from forge.model.export import MERGED, export_adapter, export_merged, export_model, in_dtype, model_logits
from forge.model.trained import AdapterWeights
from forge.ranks.agreement import on_rank_0
from forge.ranks.deepspeed import any_partitioned, gathered
from forge.ranks.partitions import whole_float32
from forge.run.files import publish_folder, read_json, write_json
from forge.task.task import Task

logger = logging.getLogger(__name__)

ROWS_OF_PROOF = 4  # whose logits are compared, of the model with its adapter and of the merged one


def export(attempt: Attempt, model: PreTrainedModel, training: Training) -> None:
    """Publish the folder final/, on rank 0; model: the bare one. Raises TrainingError where it cannot be written."""
    wanted, weights, task = attempt.config.export, training.weights, attempt.components.task
    assert attempt.lock is not None
    run, check = attempt.run, attempt.lock.check
    merged: dict[str, Any] = {}
    is_adapter = isinstance(weights, AdapterWeights)
    state = _whole_state(training, "float32" if is_adapter else wanted.dtype)
    proof: tuple[Any, ...] = ()
    if is_adapter and wanted.merge:
        proof = (*_few_inputs(task), None)
        if any_partitioned(model):  # all ranks run it, or none
            proof = (*proof[:2], model_logits(model, *proof[:2]))

    def write(folder: Path) -> None:
        if not isinstance(weights, AdapterWeights):
            export_model(model, folder, wanted.dtype, state)
        else:
            export_adapter(weights, folder, state)
            if wanted.merge:
                merged.update(
                    asdict(export_merged(folder, weights.below, task.auto_model, model, wanted.dtype, *proof))
                )
                task.save_processing(folder / MERGED)
        task.save_processing(folder)

    def publish() -> None:
        try:
            publish_folder(run.final, write, check)
            metadata = read_json(run.metadata_file)
            metadata.pop("merged", None)  # of an earlier export, which this one replaces
            write_json(run.metadata_file, {**metadata, "merged": merged} if merged else metadata, check)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"the final model could not be written ({reason}); free some space, then resume"
            ) from error

    attempt.ranks.on_rank_0(publish)
    logger.info("final model in %s", run.final)


def _whole_state(training: Training, dtype: str) -> dict[str, Tensor] | None:
    """On rank 0 the weights by the names of their file, whole, on the CPU and in that dtype, of a training that is
    sharded; one weight at a time is whole elsewhere. None on the other ranks, and where nothing is sharded. On every
    rank at once; what does not fit in the dtype is an error on all of them."""
    named, is_main = training.named, training.accelerator.is_main_process
    if training.partitions is None or named is None:
        return None
    state: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> TrainingError | None:
        """What is wrong with it, to be raised when no rank waits for another."""
        if not is_main:
            return None
        on_cpu = tensor.detach().cpu()
        try:
            state[name] = in_dtype(on_cpu, dtype, name).clone() if on_cpu.is_floating_point() else on_cpu.clone()
        except TrainingError as error:
            return error
        return None

    problem: TrainingError | None = None
    for name, parameter in named.trained.items():
        if name.startswith(PROJECTIONS):
            continue
        problem = keep(name, whole_float32(parameter)) or problem
    for name, tensor in named.constant.items():
        with gathered([tensor]):
            problem = keep(name, tensor) or problem
    on_rank_0(training.accelerator, lambda: _raise(problem))
    return state if is_main else None


def _raise(problem: TrainingError | None) -> None:
    if problem is not None:
        raise problem


def _few_inputs(task: Task) -> tuple[dict[str, Any], Tensor | None]:
    """What the model is given for the first rows of the first validation split, and which of its logits are learned;
    None: all, where none is."""
    rows = next(iter(task.validation.values()))
    batch = task.collate([rows[i] for i in range(min(ROWS_OF_PROOF, len(rows)))])
    counted = batch["labels"] != IGNORE
    return {**model_inputs(batch), **task.forward_options}, counted if counted.any() else None
