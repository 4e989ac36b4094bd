"""Computes what a cache keeps of a shard: logits or their top k at each label, hidden states at each token."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from forge.cluster.signals import in_loader_worker
from forge.config.schema import Config
from forge.data.batches import TEACHER_PREFIX, Batch, Loading, preparing, row_loader, with_positions
from forge.errors import TrainingError, UsageError
from forge.losses.linear_kd_plain import head_logits
from forge.task.task import Task
from forge.teacher.teacher import ModelTeacher, TeacherOutputs
from forge.teacher_cache.files import HIDDEN, LABEL_OFFSETS, TOKEN_OFFSETS, TRAIN, Arrays, CacheForm, Shard, split_name
from forge.teacher_cache.key import keeps_whole_logits
from forge.teacher_cache.reader import token_places
from forge.teacher_cache.top_k import top_k, truncation_kl

LOGITS_BYTES = 64 << 20  # of float32 logits that exist at a time
MEASURED = ("truncation_kl", "tail_mass")  # at the training's temperature, over validation rows


class CacheWriter:
    """Computes the contents of shards with a teacher in memory."""

    def __init__(
        self, config: Config, task: Task, teacher: ModelTeacher, accelerator: Accelerator, layers: tuple[int, ...]
    ):
        """Run the teacher once, to learn the form of its outputs.

        The teacher is placed with its own order of labels. layers are those whose hidden states are kept, for training
        rows. Raises UsageError for a layer that the teacher does not have.
        """
        self.accelerator, self._config, self._task, self._layers = accelerator, config, task, layers
        self._splits = splits_of(task)
        self._head: Tensor | None = None  # (V, H) float32, made once: a frozen teacher's stays the same
        self._lengths = {split: np.asarray(rows["length"][:]) for split, rows in self._splits.items()}
        workers = config.training.num_workers
        self._num_workers = task.num_workers if workers is None else workers
        self._teacher = teacher
        columns, self._widths = self._probe()
        if layers and layers[-1] >= len(self._widths):
            raise UsageError(
                f"distillation.hidden.layers names the teacher's layer {layers[-1]}, but it has only "
                f"{len(self._widths) - 1}, counted from 1; 0 is the embeddings' output"
            )
        self._whole = keeps_whole_logits(task)
        self._columns = columns if self._whole else min(task.logit_columns, columns)
        k = min(config.teacher.top_k, self._columns)
        of_top_k = {"log_probs": ("float16", k), "indices": (index_dtype(self._columns), k), "tails": ("float32", 2)}
        self._arrays = {"logits": ("float32", columns)} if self._whole else of_top_k  # dtype and columns of each
        names = cast(dict[int, str], teacher.model.config.id2label or {})
        self._labels = [names[i] for i in sorted(names)] if task.label_names else []

    @property
    def form(self) -> CacheForm:
        """How the outputs are kept, for the manifest."""
        dtypes = {name: dtype for name, (dtype, _) in self._arrays.items()}
        return CacheForm(
            kept="whole logits" if self._whole else "top k",
            columns=self._columns,
            top_k=None if self._whole else self._arrays["indices"][1],
            temperature=None if self._whole else self._config.distillation.temperature,
            dtypes=dtypes | {f"{HIDDEN}{layer}": "float16" for layer in self._layers},
            labels=tuple(self._labels),
            logit_scale=self._teacher.logit_scale,
            softcap=self._teacher.softcap,
            layers=self._layers,
            hidden_widths=self._widths,
        )

    def compute(self, shard: Shard) -> tuple[Arrays, dict[str, float]]:
        """Return the arrays of the shard's rows, in order, and sums over their labels for the job's report.

        Rows of similar length share a batch. Which rows do depends only on the shard and the batch size, so a stopped
        job that is resumed writes the same bits. Raises TrainingError for values that are not finite.
        """
        rows, lengths = self._splits[shard.split], self._lengths[shard.split]
        ids = np.arange(shard.first, shard.first + shard.rows)
        ordered = ids[np.argsort(lengths[ids], kind="stable")[::-1]]
        size = self._config.evaluation.per_device_batch_size
        batches = [ordered[i : i + size].tolist() for i in range(0, len(ordered), size)]
        loaded = iter(
            row_loader(
                rows,
                batches,
                self._task.collate,
                Loading(self._num_workers, self.accelerator.device.type == "cuda", in_loader_worker),
            )
        )
        trained_on = shard.split == TRAIN
        by_row: dict[int, Arrays] = {row: {} for row in ids.tolist()}
        sums = dict.fromkeys(MEASURED, 0.0) if not trained_on and not self._whole else {}
        self._teacher.layers = self._layers if trained_on else ()
        for _ in batches:
            with preparing(f"a batch of {shard.split}"):
                batch = next(loaded)
            outputs = self._teacher.outputs(send_to_device(batch, self.accelerator.device), None, 1.0)
            _distribute(by_row, batch, self._at_labels(outputs, len(batch["positions"]), sums), labels_per_row(batch))
            if self._teacher.layers:
                counts = _tokens_per_row(batch, lengths)
                _distribute(by_row, batch, self._at_tokens(outputs, batch, counts), counts)
        return _joined(list(by_row.values())), sums

    def _probe(self) -> tuple[int, tuple[int, ...]]:
        """Return the columns of the teacher's logits and, if hidden states are kept, the widths of all layers."""
        batch = with_positions(self._task.collate([self._task.train[0]]), [0])
        batch = send_to_device(batch, self.accelerator.device)
        outputs = self._teacher.outputs(batch, None, 1.0)
        columns = outputs["logits"].shape[1] if "logits" in outputs else outputs["head"].shape[0]
        return columns, self._teacher.hidden_widths(batch) if self._layers else ()

    def _at_labels(self, outputs: TeacherOutputs, labels: int, sums: dict[str, float]) -> Arrays:
        """Return what is kept at a batch's labels; add to the sums, if there are any."""
        if self._whole:
            return {"logits": outputs["logits"].float().cpu().numpy()}
        temperature, k = self._config.distillation.temperature, self._arrays["indices"][1]
        parts: dict[str, list[np.ndarray]] = {
            name: [np.zeros((0, columns), dtype)] for name, (dtype, columns) in self._arrays.items()
        }
        at_once = max(1, LOGITS_BYTES // (4 * self._columns))
        for start in range(0, labels, at_once):
            logits = self._logits(outputs, slice(start, start + at_once))
            kept = top_k(logits, k, temperature)
            if sums:
                sums["truncation_kl"] += truncation_kl(logits, kept, temperature).double().sum().item()
                sums["tail_mass"] += kept.tails[:, 1].double().sum().item()
            for name, pieces in parts.items():
                pieces.append(getattr(kept, name).cpu().numpy().astype(self._arrays[name][0]))
        return {name: np.concatenate(pieces) for name, pieces in parts.items()}

    def _logits(self, outputs: TeacherOutputs, part: slice) -> Tensor:
        """Return the logits at some of the labels: (n, V) float32, with V columns that are tokens."""
        if "head" not in outputs:
            return outputs["logits"][part, : self._columns].float()
        if self._head is None:
            self._head = outputs["head"][: self._columns].float()
        bias = outputs.get("head_bias")
        raw = outputs["hidden"][part].float() @ self._head.T
        teacher = self._teacher
        return head_logits(
            raw, None if bias is None else bias[: self._columns], teacher.logit_scale, teacher.softcap or 0.0
        )[0]

    def _at_tokens(self, outputs: TeacherOutputs, batch: Batch, counts: np.ndarray) -> Arrays:
        """Return the hidden states at a batch's tokens, without padding."""
        arrays = {}
        for layer in self._layers:
            name = f"{HIDDEN}{layer}"
            states = outputs[name]  # (B, T, D)
            own = batch.get(f"{TEACHER_PREFIX}attention_mask", batch.get("attention_mask"))
            mask = {} if own is None else {"attention_mask": own.to(states.device)}
            places = token_places(mask, counts.tolist(), states.shape[1], states.device)
            arrays[name] = states.flatten(0, 1)[places].half().cpu().numpy()
        return arrays


def index_dtype(columns: int) -> str:
    """Return the smallest dtype that holds the ids of this many tokens."""
    return "uint16" if columns <= 1 << 16 else "int32"


def labels_per_row(batch: Batch) -> np.ndarray:
    """Return the number of labels of each row: (B,) int64. The batch is on the CPU."""
    return torch.bincount(batch["positions"] // batch["labels"][0].numel(), minlength=len(batch["ids"])).numpy()


def _tokens_per_row(batch: Batch, lengths: np.ndarray) -> np.ndarray:
    """Return the number of tokens that the model reads of each row: (B,) int64.

    lengths are those of the split's rows, for batches without a mask.
    """
    if "attention_mask" in batch:
        return np.asarray(batch["attention_mask"].sum(dim=1))
    return np.asarray(lengths[batch["ids"].numpy()])


def _distribute(by_row: dict[int, Arrays], batch: Batch, arrays: Arrays, counts: np.ndarray) -> None:
    """Add to each row its part of a batch's arrays. Raises TrainingError for values that are not finite."""
    ids = batch["ids"].tolist()
    for name, array in arrays.items():
        # In logits and their top k, -inf is an impossible token; no other value may be infinite or NaN.
        bad = np.isinf(array) if name.startswith(HIDDEN) else np.isinf(array) & (array > 0)
        if (bad | np.isnan(array)).any():
            reason = "; set teacher.dtype: float32" if not name.startswith(HIDDEN) else ", or too large for float16"
            raise TrainingError(f"the teacher's {name} of the rows {ids[:3]}… are not finite{reason}")
        for row, part in zip(ids, np.split(array, np.cumsum(counts)[:-1]), strict=True):
            by_row[row][name] = part


def _joined(rows: Sequence[Arrays]) -> Arrays:
    """Concatenate the rows' arrays by name, and add the offsets at which each row starts."""
    arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    for offsets, names in (
        (LABEL_OFFSETS, [name for name in arrays if not name.startswith(HIDDEN)]),
        (TOKEN_OFFSETS, [name for name in arrays if name.startswith(HIDDEN)]),
    ):
        if names:
            arrays[offsets] = np.cumsum([0, *(len(row[names[0]]) for row in rows)], dtype=np.int64)
    return arrays


def splits_of(task: Task) -> dict[str, Any]:
    """Return the rows by the name of their split in a cache."""
    return {split_name(None): task.train, **{split_name(name): rows for name, rows in task.validation.items()}}
