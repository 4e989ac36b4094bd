"""Exports the final model of a run with its tokenizer or processor, and checks a merged one against its adapter."""

import logging
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from forge.attempt.attempt import Attempt
from forge.checkpoint.contents import Training
from forge.checkpoint.shards import PROJECTIONS
from forge.data.batches import model_inputs
from forge.errors import TrainingError
from forge.losses.cross_entropy import IGNORE
from forge.model.export import MERGED, MergeProof, cast_weight, model_logits
from forge.model.weights import TrainedWeights
from forge.ranks.agreement import on_rank_0
from forge.ranks.deepspeed import any_partitioned, gathered
from forge.ranks.partitions import whole_float32
from forge.run.files import publish_folder
from forge.run.metadata import Merged, amend_metadata
from forge.task.task import Task

logger = logging.getLogger(__name__)

PROOF_ROWS = 4  # rows whose logits are compared between the trained model and the merged one


def export(attempt: Attempt, weights: TrainedWeights, training: Training) -> None:
    """Publish the folder final/, on rank 0. Raises TrainingError if it cannot be written."""
    settings, model, task = attempt.config.export, weights.model, attempt.components.task
    run, check = attempt.run, attempt.lock.check
    state = _whole_state(training, weights.export_dtype(settings))
    proof: MergeProof | None = None
    if weights.merges(settings):
        proof = _merge_proof(task)
        if any_partitioned(model):  # all ranks run it together
            proof = replace(proof, trained_logits=model_logits(model, proof))
    merged: Merged | None = None

    def write(folder: Path) -> None:
        nonlocal merged
        merged = weights.export(folder, settings, state=state, proof=proof)
        if merged is not None:
            task.save_processing(folder / MERGED)
        task.save_processing(folder)

    def publish() -> None:
        try:
            publish_folder(run.final, write, check)
            amend_metadata(run, check, merged=merged)  # replaces what an earlier export wrote
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"the final model could not be written ({reason}); free some space, then resume"
            ) from error

    attempt.ranks.on_rank_0(publish)
    logger.info("final model in %s", run.final)


def _whole_state(training: Training, dtype: str) -> dict[str, Tensor] | None:
    """Gather the weights of a sharded training on rank 0: whole, on the CPU, in that dtype, by their names in the file.

    Called by every rank at once; the other ranks hold one whole weight at a time. Returns None on them, and where
    nothing is sharded. A value that is out of range for the dtype is an error on every rank.
    """
    named, is_main = training.named, training.accelerator.is_main_process
    if training.partitions is None or named is None:
        return None
    state: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> TrainingError | None:
        """Return the error, if any, to be raised when no rank waits for another."""
        if not is_main:
            return None
        on_cpu = tensor.detach().cpu()
        try:
            state[name] = cast_weight(on_cpu, dtype, name).clone() if on_cpu.is_floating_point() else on_cpu.clone()
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


def _merge_proof(task: Task) -> MergeProof:
    """Return the first rows of the first validation split, with a mask of their learned logits if there are any."""
    rows = next(iter(task.validation.values()))
    batch = task.collate([rows[i] for i in range(min(PROOF_ROWS, len(rows)))])
    counted = batch["labels"] != IGNORE
    return MergeProof(
        task.auto_model, {**model_inputs(batch), **task.forward_options}, counted if counted.any() else None
    )
