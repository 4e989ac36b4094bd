"""Writes what is left of a run: the final model with its tokenizer or processor, and the proof of a merged one."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from forge.cluster.ranks import on_rank_0
from forge.errors import TrainingError
from forge.losses.cross_entropy import IGNORE
from forge.model.export import MERGED, export_adapter, export_merged, export_model
from forge.model.trained import AdapterWeights
from forge.run.files import publish_folder, read_json, write_json
from forge.task.batches import model_inputs
from forge.task.task import Task
from forge.trainer.finetuning import FinetuningTrainer

logger = logging.getLogger(__name__)

ROWS_OF_PROOF = 4  # whose logits are compared, of the model with its adapter and of the merged one


def export(trainer: FinetuningTrainer) -> None:
    """Publishes the folder final/, on rank 0. Raises TrainingError where it cannot be written."""
    wanted, weights, task = trainer.config.export, trainer.weights, trainer.task
    merged: dict[str, Any] = {}

    def write(folder: Path) -> None:
        if not isinstance(weights, AdapterWeights):
            export_model(trainer.model, folder, wanted.dtype)
        else:
            export_adapter(weights, folder)
            if wanted.merge:
                proof = _few_inputs(task)
                merged.update(
                    asdict(export_merged(folder, weights.below, task.auto_model, trainer.model, wanted.dtype, *proof))
                )
                task.save_processing(folder / MERGED)
        task.save_processing(folder)

    def publish() -> None:
        try:
            publish_folder(trainer.run.final, write, trainer.lock.check)
            metadata = read_json(trainer.run.metadata_file)
            metadata.pop("merged", None)  # of an earlier export, which this one replaces
            write_json(
                trainer.run.metadata_file, {**metadata, "merged": merged} if merged else metadata, trainer.lock.check
            )
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"the final model could not be written ({reason}); free some space, then resume"
            ) from error

    on_rank_0(trainer.accelerator, publish)
    logger.info("final model in %s", trainer.run.final)


def _few_inputs(task: Task) -> tuple[dict[str, Any], Tensor | None]:
    """What the model is given for the first rows of the first validation split, and which of its logits are learned;
    None: all, where none is."""
    rows = next(iter(task.validation.values()))
    batch = task.collate([rows[i] for i in range(min(ROWS_OF_PROOF, len(rows)))])
    counted = batch["labels"] != IGNORE
    return {**model_inputs(batch), **task.forward_options}, counted if counted.any() else None
