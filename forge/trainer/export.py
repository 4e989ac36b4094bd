"""Writes what is left of a run: the final model with its tokenizer or processor, and the proof of a merged one."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from forge.checkpoint.shards import PROJECTIONS
from forge.data.batches import model_inputs
from forge.errors import TrainingError
from forge.losses.cross_entropy import IGNORE
from forge.model.export import MERGED, export_adapter, export_merged, export_model, in_dtype, model_logits
from forge.model.trained import AdapterWeights
from forge.ranks.agreement import on_rank_0
from forge.ranks.deepspeed import any_partitioned, gathered
from forge.ranks.partitions import whole_float32
from forge.run.files import publish_folder
from forge.run.metadata import Merged, amend_metadata
from forge.task.task import Task
from forge.trainer.loop import FinetuningTrainer

logger = logging.getLogger(__name__)

ROWS_OF_PROOF = 4  # whose logits are compared, of the model with its adapter and of the merged one


def export(trainer: FinetuningTrainer) -> None:
    """Publishes the folder final/, on rank 0. Raises TrainingError where it cannot be written."""
    wanted, weights, task = trainer.config.export, trainer.weights, trainer.task
    merged: dict[str, Any] = {}
    is_adapter = isinstance(weights, AdapterWeights)
    state = _whole_state(trainer, "float32" if is_adapter else wanted.dtype)
    proof: tuple[Any, ...] = ()
    if is_adapter and wanted.merge:
        proof = (*_few_inputs(task), None)
        if any_partitioned(trainer.model):  # all ranks run it, or none
            proof = (*proof[:2], model_logits(trainer.model, *proof[:2]))

    def write(folder: Path) -> None:
        if not isinstance(weights, AdapterWeights):
            export_model(trainer.model, folder, wanted.dtype, state)
        else:
            export_adapter(weights, folder, state)
            if wanted.merge:
                merged.update(
                    asdict(export_merged(folder, weights.below, task.auto_model, trainer.model, wanted.dtype, *proof))
                )
                task.save_processing(folder / MERGED)
        task.save_processing(folder)

    def publish() -> None:
        try:
            publish_folder(trainer.run.final, write, trainer.lock.check)
            proven = Merged(**merged) if merged else None  # of an earlier export, which this one replaces
            amend_metadata(trainer.run, trainer.lock.check, merged=proven)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"the final model could not be written ({reason}); free some space, then resume"
            ) from error

    on_rank_0(trainer.accelerator, publish)
    logger.info("final model in %s", trainer.run.final)


def _whole_state(trainer: FinetuningTrainer, dtype: str) -> dict[str, Tensor] | None:
    """On rank 0 the weights by the names of their file, whole, on the CPU and in that dtype, of a training that is
    sharded; one weight at a time is whole elsewhere. None on the other ranks, and where nothing is sharded. On every
    rank at once; what does not fit in the dtype is an error on all of them."""
    named, is_main = trainer.parts.named, trainer.accelerator.is_main_process
    if trainer.parts.partitions is None or named is None:
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
    on_rank_0(trainer.accelerator, lambda: _raise(problem))
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
