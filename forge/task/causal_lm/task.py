"""The causal LM task: conversations, completions and plain text, their batches, model and metrics."""

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from forge.config.schema import Config, EvaluationConfig, ModelConfig, TrainingConfig
from forge.config.task_schema import CausalLmTask
from forge.data.batches import Batch, Row, evaluated_rows
from forge.data.fingerprints import rows_hash, text_hash, tokenizer_hash
from forge.data.packing import check_packing, collate_packed, pack, shifted_labels
from forge.data.rows import StreamedRows, describe, load_rows, load_stream
from forge.data.stream import RowStream
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.generation import end_with
from forge.model.load import (
    LoadedModel,
    check_embeddings,
    check_fits,
    check_limit,
    load_own_tokenizer,
    load_whole,
    scratch_config,
)
from forge.task.causal_lm.alignment import align_split
from forge.task.causal_lm.bpe import train_bpe
from forge.task.causal_lm.chat import load_text
from forge.task.causal_lm.documents import NOTES, Encoder, build_encoder
from forge.task.causal_lm.ends import stop_tokens
from forge.task.causal_lm.forms import RowForm, choose_form, training_texts
from forge.task.causal_lm.metrics import CausalLmMetrics
from forge.task.causal_lm.truncation import Cut, encode_split, prepare_rows
from forge.task.probe import check_causal
from forge.task.task import Task, task_section

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CausalLm(Task):
    """Documents with the columns input_ids, learned (a token that is a label), length; training rows may be packed."""

    config: CausalLmTask
    evaluation: EvaluationConfig
    seed: int  # of the rows that are evaluated
    processing: PreTrainedTokenizerBase
    encoder: Encoder
    ends: list[int]  # tokens that end a reply or a text
    train: Any  # a Dataset, or a RowStream
    validation: dict[str, Dataset]  # by short name
    fingerprint: str  # hash of texts and messages, template and tokenizer
    description: str
    rows: dict[str, int]  # by split, before packing; without a stream's, whose number is unknown
    cuts: dict[str, Cut]  # by split
    texts: dict[str, Dataset]  # by split, as they were read; without a stream
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    teacher_facts: dict[str, Any] = field(default_factory=dict)  # about the alignment with the teacher's own tokens
    same_tokens: bool = True

    name: ClassVar[str] = "causal_lm"
    title: ClassVar[str] = "A causal language model"
    pipeline_tag: ClassVar[str] = "text-generation"
    auto_model: ClassVar[type[Any]] = AutoModelForCausalLM
    main_metric: ClassVar[str] = "ce"
    headline: ClassVar[tuple[str, ...]] = ("ce", "perplexity", "token_accuracy")
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    has_language_head: ClassVar[bool] = True
    aligns_labels: ClassVar[bool] = True

    @classmethod
    def load(cls, config: Config) -> "CausalLm":
        return load_causal_lm(config)

    @classmethod
    def _vocabulary_size(cls, section: ModelConfig) -> int:
        _check_tokenizer_kind(section)
        return super()._vocabulary_size(section)

    def load_model(self, config: ModelConfig, training: TrainingConfig, key: str = "model") -> LoadedModel:
        """Return a causal LM that ends its texts like the rows.

        Raises UsageError for a model without an embedding for every token, and for one that mixes packed rows.
        """
        tokenizer = self.tokenizer_of(key)
        scratch = None
        if config.config is not None:
            ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            scratch = scratch_config(
                config.config, f"{key}.config", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ends
            )
        loaded = load_whole(AutoModelForCausalLM, config, key, "weights for a causal LM", scratch)
        check_embeddings(loaded.model.get_input_embeddings(), tokenizer, key)
        check_fits(loaded.model, self.config.max_length, training)
        check_causal(loaded.model, self.forward_options, key)
        if self.config.packing and key == "model":
            check_packing(loaded.model, self.forward_options)
        end_with(loaded.model, self.ends, int(tokenizer.pad_token_id))
        return loaded

    def key_parts(self) -> dict[str, Any]:
        template = self.encoder.template
        return {} if template is None else {"the chat template": text_hash(template.text)}

    def without_shown_texts(self) -> "CausalLm":
        return replace(self, evaluation=self.evaluation.model_copy(update={"shown_texts": 0}))

    def for_teacher(self, tokenizer: PreTrainedTokenizerBase) -> "CausalLm":
        """Return the task with its training rows also as the teacher's own template and tokens, and their alignment.

        Raises UsageError if the teacher's tokenizer cannot write the rows, and if no label is aligned.
        """
        encoder = self._teacher_encoder(tokenizer)
        found = align_split(self.encoder, encoder, self.texts["train"], f"{self.description}, train")
        found = found.select(self.train["row"])
        labels, aligned = sum(self.train["labels"]), sum(map(len, found["aligned"]))
        cut = sum(tokens > 0 for tokens in found["teacher_cut"])
        lacking = sum(found["teacher_unprinted"])
        if not aligned:
            raise UsageError(
                "no label can be aligned with the teacher's tokens: the two chat templates write the replies "
                "differently, or task.max_length cuts them off; compare the templates, or use another teacher"
            )
        logger.info(
            "train: the teacher reads its own tokens; %d of %d labels (%.1f %%) are aligned with one of its own; %d of "
            "its rows are cut to task.max_length %d",
            *(aligned, labels, 100 * aligned / labels, cut, self.config.max_length),
        )
        if lacking:
            logger.warning(
                "train: the teacher's chat template does not write a part of %d rows; %s (task.unprinted)",
                *(lacking, "it says nothing about them" if self.config.unprinted == "leave_out" else "it lacks that"),
            )
        facts = {"labels": labels, "aligned": aligned, "teacher_rows_cut": cut, "teacher_rows_unprinted": lacking}
        return replace(
            self,
            train=concatenate_datasets(
                [self.train, found.remove_columns(["teacher_cut", "teacher_unprinted"])], axis=1
            ),
            teacher_tokenizer=tokenizer,
            teacher_facts=facts,
            same_tokens=False,
        )

    def _teacher_encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        check_limit(self.config.max_length, tokenizer, "the teacher's tokenizer")
        if self.encoder.form.name == "messages" and not tokenizer.chat_template:
            raise UsageError(
                "the data are messages, but the teacher's tokenizer has no chat template; name the tokenizer of an "
                "instruct model with teacher.tokenizer"
            )
        config = self.config.model_copy(update={"chat_template": None})  # that key names the student's template
        return build_encoder(config, tokenizer, self.encoder.form)

    def collate(self, rows: list[Row]) -> Batch:
        """Return input_ids, labels (B, T) int64; attention_mask (B, T), or position_ids for packed rows; tokens ().

        labels[:, t] is the token t + 1 where that is learned. For a teacher with its own tokens also teacher_input_ids,
        teacher_attention_mask (B, Tt) int64, and aligned, teacher_aligned (M,) int64: positions in the flattened (B, T)
        and (B, Tt) that predict the same.
        """
        pad = int(self.processing.pad_token_id)
        batch = collate_packed(rows, pad) if "lengths" in rows[0] else _padded(rows, pad)
        if self.teacher_tokenizer is not None and "aligned" in rows[0]:
            batch |= _teacher_batch(rows, batch["input_ids"].shape[1], int(self.teacher_tokenizer.pad_token_id))
        return batch

    def metrics(self, split: str, model: PreTrainedModel) -> "CausalLmMetrics":
        """Return an empty count, with the rows that the model will reply to itself."""
        rows = self.validation[split]
        chosen = evaluated_rows(len(rows), self.evaluation.max_rows, self.seed)
        spread = np.linspace(0, len(chosen) - 1, min(self.evaluation.shown_texts, len(chosen))).astype(int)
        shown = [rows[int(chosen[i])] for i in spread]
        return CausalLmMetrics(model, self.processing, shown, plain_text=self.encoder.form.name == "text")

    def facts(self) -> dict[str, Any]:
        packed = {} if isinstance(self.train, RowStream) else {"train": len(self.train)}
        return {
            "description": self.description,
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            **({"packed_rows": packed} if self.config.packing else {}),
            "format": self.encoder.form.name,
            "chat_template": self.encoder.template.text if self.encoder.template else None,
            "cut": {split: asdict(cut) for split, cut in self.cuts.items()},
            **({"alignment": self.teacher_facts} if self.teacher_facts else {}),
        }


def _padded(rows: list[Row], pad: int) -> Batch:
    """Return a batch of one document a row, padded on the right."""
    shape = (len(rows), max(row["length"] for row in rows))
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : row["length"]] = torch.tensor(row["input_ids"])
        labels[b, : row["length"]] = torch.tensor(shifted_labels(row["input_ids"], row["learned"]))
        mask[b, : row["length"]] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "tokens": mask.sum()}


def _teacher_batch(rows: list[Row], width: int, pad: int) -> Batch:
    """Return the teacher's tensors of a batch; width: of the student's rows in it."""
    shape = (len(rows), max(len(row["teacher_input_ids"]) for row in rows))
    ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    ours: list[int] = []
    theirs: list[int] = []
    for b, row in enumerate(rows):
        length = len(row["teacher_input_ids"])
        ids[b, :length] = torch.tensor(row["teacher_input_ids"])
        mask[b, :length] = 1
        ours += [b * width + place for place in row["aligned"]]
        theirs += [b * shape[1] + place for place in row["teacher_aligned"]]
    places = {
        "aligned": torch.tensor(ours, dtype=torch.int64),
        "teacher_aligned": torch.tensor(theirs, dtype=torch.int64),
    }
    return {"teacher_input_ids": ids, "teacher_attention_mask": mask, **places}


def load_causal_lm(whole: Config) -> CausalLm:
    """Return the task with its data, checked and tokenized. Raises UsageError for a row that cannot be learned from."""
    config = task_section(whole, CausalLmTask)
    where = describe(config.dataset)
    read = _read(config, whole.evaluation.max_rows)
    form = choose_form(config, read.columns, where)
    _check_columns(form, read.splits, where)
    if form.name == "messages" and "tools" in read.columns:
        logger.warning("%s: the column tools is not read: each conversation is written as if it had no tools", where)
    tokenizer = _tokenizer(whole, config, form, read.train, where)
    check_limit(config.max_length, tokenizer, "the tokenizer's model")
    encoder = build_encoder(config, tokenizer, form)
    if config.chat_template is not None:  # the trained model is to be used with the template that it was trained with
        tokenizer.chat_template = load_text(config.chat_template)
    elif isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")

    encoded: dict[str, Dataset] = {}
    cuts: dict[str, Cut] = {}
    for split, rows in read.splits.items():
        encoded[split], cuts[split] = encode_split(encoder, rows, where, split)
    ends = stop_tokens(encoder, encoded)
    encoded = {split: rows.remove_columns(list(NOTES)) for split, rows in encoded.items()}
    counts = {split: len(rows) for split, rows in encoded.items()}
    if config.dataset.streaming:
        train: Dataset | RowStream = _stream(encoder, read.train, f"{where}, train")
    else:
        train = encoded.pop("train")
        train = _packed(train, config.max_length) if config.packing else train
    return CausalLm(
        config=config,
        evaluation=whole.evaluation,
        seed=whole.training.seed,
        processing=tokenizer,
        encoder=encoder,
        ends=ends,
        train=train,
        validation=encoded,
        fingerprint=_fingerprint(encoder, read.splits, read.stream),
        description=where,
        rows=counts,
        cuts=cuts,
        texts=read.splits,
    )


@dataclass(frozen=True)
class _Read:
    """The raw rows of a data set."""

    train: Dataset | StreamedRows
    columns: list[str]  # of the training rows; of a stream those of a validation split
    splits: dict[str, Dataset]  # those that are loaded: the training split unless it is a stream, and the validation
    stream: str  # the identity of a stream; else ""


def _read(config: CausalLmTask, max_evaluated: int | None) -> _Read:
    if config.dataset.streaming:
        stream, validation, identity = load_stream(config.dataset, max_evaluated)
        return _Read(stream, list(next(iter(validation.values())).column_names), validation, identity)
    train, validation = load_rows(config.dataset)
    return _Read(train, train.column_names, {"train": train, **validation}, "")


def _check_columns(form: RowForm, splits: dict[str, Dataset], where: str) -> None:
    """Raise UsageError for a split without the columns that the training rows have."""
    for split, rows in splits.items():
        if lacking := [name for name in form.columns if name not in rows.column_names]:
            has = ", ".join(rows.column_names)
            raise UsageError(f"{where}, {split}: there is no column {lacking[0]}, which train has; it has: {has}")


def _stream(encoder: Encoder, rows: Any, where: str) -> RowStream:
    return RowStream(
        rows,
        lambda rows, numbers: prepare_rows(encoder, rows, numbers, where),
        shuffle_buffer=encoder.config.dataset.shuffle_buffer,
        description=where,
    )


def _tokenizer(whole: Config, config: CausalLmTask, form: RowForm, train: Any, where: str) -> PreTrainedTokenizerBase:
    new = whole.model.new_tokenizer if whole.model.config is not None else None  # a checkpoint brings its own
    if new is None:
        return load_own_tokenizer(whole.model)
    _check_tokenizer_kind(whole.model)
    chat = form.name == "messages"
    tokenizer = train_bpe(training_texts(config, form, train, where), new.vocab_size, chat=chat)
    logger.info("a new tokenizer of %d tokens was trained on the training split", len(tokenizer))
    return tokenizer


def _check_tokenizer_kind(section: ModelConfig) -> None:
    """Raise UsageError for a new tokenizer of characters."""
    new = section.new_tokenizer
    if new is not None and new.kind != "bpe":
        raise UsageError(f"model.new_tokenizer.kind is {new.kind}, but a causal LM needs kind: bpe")


def _fingerprint(encoder: Encoder, splits: dict[str, Dataset], stream: str) -> str:
    """Return the hash of the columns that are read, the template and the tokenizer; a stream only adds its identity.

    It is recorded in runs and compared when they resume, so what goes into it must stay the same for the same data.
    """
    rows = rows_hash({split: rows.select_columns(list(encoder.form.columns)) for split, rows in splits.items()})
    template = encoder.template.text if encoder.template else ""
    return text_hash(f"{rows} {template} {stream} {tokenizer_hash(encoder.tokenizer)}")


def _packed(train: Dataset, max_length: int) -> Dataset:
    packed = pack(train, max_length)
    full = sum(packed["length"][:]) / (len(packed) * max_length)
    logger.info(
        "train: %d rows are packed into %d of up to %d tokens, %.1f %% full",
        *(len(train), len(packed), max_length, 100 * full),
    )
    return packed
