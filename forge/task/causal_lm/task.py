"""The causal LM task: conversations, completions and plain text, their batches, their model and their metrics."""

import hashlib
import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from forge.config.schema import Config, EvaluationConfig, ModelConfig, TrainingConfig
from forge.config.task_schema import CausalLmTask
from forge.data.batches import Batch, evaluated_rows
from forge.data.fingerprints import tokenizer_hash
from forge.data.packing import check_packing, collate_packed, pack, shifted_labels
from forge.data.rows import describe, fingerprint, load_rows, load_stream
from forge.data.stream import RowStream
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.generation import end_with, write
from forge.model.load import (
    LoadedModel,
    check_embeddings,
    check_fits,
    load_own_tokenizer,
    load_whole,
    scratch_config,
)
from forge.task.causal_lm.alignment import align_split
from forge.task.causal_lm.bpe import train_bpe
from forge.task.causal_lm.chat import load_text
from forge.task.causal_lm.documents import (
    Cut,
    Encoder,
    RowForm,
    build_encoder,
    choose_form,
    encode_split,
    prepare_rows,
    training_texts,
)
from forge.task.task import Metrics, Sample, Task

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 256  # of a sample's own text at most: samples are looked at, and take time in every evaluation
ROWS_FOR_ENDS = 100  # of each validation split: a template ends its replies with one token, rarely two


@dataclass(frozen=True)
class CausalLm(Task):
    """Documents with the columns input_ids, learned (a token that is a label), length; training rows may be packed."""

    config: CausalLmTask
    evaluation: EvaluationConfig
    seed: int  # of the rows that are evaluated
    processing: PreTrainedTokenizerBase
    encoder: Encoder
    ends: list[int]  # tokens that a reply, or a text, ends with
    train: Any  # a Dataset, or a RowStream
    validation: dict[str, Dataset]  # by short name
    fingerprint: str  # of texts and messages, template and tokenizer
    description: str
    rows: dict[str, int]  # by split, before packing; of a stream unknown
    cuts: dict[str, Cut]  # by split
    texts: dict[str, Dataset]  # by split, as they were read; a stream is not among them
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    teacher_facts: dict[str, Any] = field(default_factory=dict)  # of the alignment with the teacher's own tokens
    same_tokens: bool = True

    name: ClassVar[str] = "causal_lm"
    title: ClassVar[str] = "A causal language model"
    pipeline_tag: ClassVar[str] = "text-generation"
    auto_model: ClassVar[type[Any]] = AutoModelForCausalLM
    main_metric: ClassVar[str] = "loss"
    headline: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}
    has_language_head: ClassVar[bool] = True

    def load_model(self, config: ModelConfig, training: TrainingConfig, key: str = "model") -> LoadedModel:
        """A causal LM with an embedding for every token, which stops where the rows do; one that mixes packed rows is
        refused."""
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
        if self.config.packing and key == "model":
            check_packing(loaded.model, self.forward_options)
        end_with(loaded.model, self.ends, int(tokenizer.pad_token_id))
        return loaded

    def without_shown_texts(self) -> "CausalLm":
        return replace(self, evaluation=self.evaluation.model_copy(update={"shown_texts": 0}))

    def for_teacher(self, tokenizer: PreTrainedTokenizerBase) -> "CausalLm":
        """With the training rows also as the teacher's own template and tokens, and the places where both have read the
        same text. Raises UsageError where the teacher's tokenizer cannot write them, and where nothing is aligned."""
        longest = self.config.max_length
        if longest > tokenizer.model_max_length:
            limit = tokenizer.model_max_length
            raise UsageError(f"task.max_length is {longest}, and the teacher's tokenizer takes at most {limit}")
        if self.encoder.form.name == "messages" and not tokenizer.chat_template:
            raise UsageError(
                "the teacher's tokenizer has no chat template, and the data are messages; name the tokenizer of an "
                "instruct model with teacher.tokenizer"
            )
        config = self.config.model_copy(update={"chat_template": None})  # which is the student's
        encoder = build_encoder(config, tokenizer, self.encoder.form)
        found = align_split(self.encoder, encoder, self.texts["train"], f"{self.description}, train")
        found = found.select(self.train["row"])
        labels, aligned = sum(self.train["labels"]), sum(map(len, found["aligned"]))
        cut = sum(tokens > 0 for tokens in found["teacher_cut"])
        if not aligned:
            raise UsageError(
                "no label has a place in the teacher's rows where both have read the same text: the two chat templates "
                "write the replies otherwise, or task.max_length cuts them off; look at both, or use another teacher"
            )
        logger.info(
            "train: the teacher reads its own tokens; %d of %d labels (%.1f %%) are aligned with one of its own; %d of "
            "its rows are cut to task.max_length %d",
            *(aligned, labels, 100 * aligned / labels, cut, longest),
        )
        return replace(
            self,
            train=concatenate_datasets([self.train, found.remove_columns("teacher_cut")], axis=1),
            teacher_tokenizer=tokenizer,
            teacher_facts={"labels": labels, "aligned": aligned, "teacher_rows_cut": cut},
            same_tokens=False,
        )

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """input_ids, labels (B, T) int64, labels[:, t] the token t + 1 where it is learned; attention_mask (B, T), or
        position_ids for packed rows; tokens () int64.

        Beside a teacher with tokens of its own also teacher_input_ids and teacher_attention_mask (B, Tt), and aligned
        and teacher_aligned (M,) int64: places in the flattened (B, T) and (B, Tt)."""
        pad = int(self.processing.pad_token_id)
        batch = collate_packed(rows, pad) if "lengths" in rows[0] else _padded(rows, pad)
        if self.teacher_tokenizer is not None and "aligned" in rows[0]:
            batch |= _of_the_teacher(rows, batch["input_ids"].shape[1], int(self.teacher_tokenizer.pad_token_id))
        return batch

    def metrics(self, split: str, model: PreTrainedModel) -> "CausalLmMetrics":
        """An empty count, and the rows that the model is to write itself."""
        rows = self.validation[split]
        chosen = evaluated_rows(len(rows), self.evaluation.max_rows, self.seed)
        spread = np.linspace(0, len(chosen) - 1, min(self.evaluation.shown_texts, len(chosen))).astype(int)
        return CausalLmMetrics(self, model, [rows[int(chosen[i])] for i in spread])

    def facts(self) -> dict[str, Any]:
        """What run_metadata.json tells of the data."""
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


class CausalLmMetrics(Metrics):
    """Counts label tokens, those predicted right, and their cross-entropy; then lets the model write a few rows."""

    def __init__(self, task: CausalLm, model: PreTrainedModel, shown: list[dict[str, Any]]):
        self.counts = torch.zeros(3, dtype=torch.float64)  # labels, right, cross-entropy in nats
        self.samples = []
        self._task, self._model, self._shown = task, model, shown

    def update(self, outputs: dict[str, Tensor], batch: Batch) -> None:
        """outputs: ce_sum (), predictions (B, T) int64, aligned with the labels. No sync with the device."""
        labels = batch["labels"]
        counted = labels != IGNORE
        right = counted & (outputs["predictions"] == labels)
        sums = torch.stack([counted.sum().double(), right.sum().double(), outputs["ce_sum"].double()])
        self.counts = self.counts.to(labels.device) + sums

    def compute(self) -> dict[str, float | int]:
        """perplexity, the exponential of the mean loss; token_accuracy, the share of labels that are the likeliest
        token, each behind the true text; labels, their number. Fills samples, on the first rank."""
        labels, right, ce_sum = self.counts.cpu()  # waits for the GPU
        if self._shown:
            written = generate_replies(self._model, self._task, self._shown)  # on all ranks: weights may be sharded
            self.samples = written if PartialState().is_main_process else []
        return {
            "perplexity": (ce_sum / labels).exp().item(),
            "token_accuracy": (right / labels).item(),
            "labels": int(labels),
        }


def _padded(rows: list[dict[str, Any]], pad: int) -> Batch:
    """A document a row, the shorter ones padded behind their end."""
    shape = (len(rows), max(row["length"] for row in rows))
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : row["length"]] = torch.tensor(row["input_ids"])
        labels[b, : row["length"]] = torch.tensor(shifted_labels(row["input_ids"], row["learned"]))
        mask[b, : row["length"]] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "tokens": mask.sum()}


def _of_the_teacher(rows: list[dict[str, Any]], width: int, pad: int) -> Batch:
    """width: of the student's rows in this batch."""
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


def generate_replies(model: PreTrainedModel, task: CausalLm, rows: list[dict[str, Any]]) -> list[Sample]:
    """What the model itself writes, always taking the likeliest token, where the last reply of each row stands.

    A plain text is written on from its middle.
    """
    tokenizer = task.processing
    plain_text = task.encoder.form.name == "text"
    places = [(max(1, row["length"] // 2), row["length"]) if plain_text else _last_reply(row) for row in rows]
    starts = [start for start, _ in places]
    replies = [row["input_ids"][start:end] for row, (start, end) in zip(rows, places, strict=True)]
    width = max(starts)
    ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):  # padded at the left: all end at one place
        ids[b, width - start :] = torch.tensor(row["input_ids"][:start])
        mask[b, width - start :] = 1
    room = min(SHOWN_TOKENS, max(len(reply) for reply in replies) + 16)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = min(room, positions - width) if positions else room
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    written = write(model, inputs, max(1, room))[:, width:].tolist()  # waits for the GPU

    def plain(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    return [
        Sample(row["row"], plain(reply[:SHOWN_TOKENS]), plain(ours), str(tokenizer.decode(row["input_ids"][:start])))
        for row, start, reply, ours in zip(rows, starts, replies, written, strict=True)
    ]


def _last_reply(row: dict[str, Any]) -> tuple[int, int]:
    """Where the last run of learned tokens begins, behind at least one token, and where it ends."""
    learned = row["learned"]
    last = max(i for i, wanted in enumerate(learned) if wanted)
    return max(1, max((i for i in range(last) if not learned[i]), default=-1) + 1), last + 1


def load_causal_lm(whole: Config) -> CausalLm:
    """Loads, checks and tokenizes the data. Raises UsageError for a row that cannot be learned from."""
    config = whole.task
    assert isinstance(config, CausalLmTask)
    where = describe(config.dataset)
    train: Any
    stream = ""
    if config.dataset.streaming:
        train, validation, stream = load_stream(config.dataset, whole.evaluation.max_rows)
        columns = list(next(iter(validation.values())).column_names)
    else:
        train, validation = load_rows(config.dataset)
        columns = train.column_names
    form = choose_form(config, columns, where)
    splits: dict[str, Dataset] = validation if config.dataset.streaming else {"train": train, **validation}
    for split, rows in splits.items():
        if lacking := [name for name in form.columns if name not in rows.column_names]:
            has = ", ".join(rows.column_names)
            raise UsageError(f"{where}, {split}: there is no column {lacking[0]}, as train has it; it has: {has}")
    tokenizer = _tokenizer(whole, config, form, train, where)
    if config.max_length > tokenizer.model_max_length:
        raise UsageError(
            f"task.max_length is {config.max_length}, and the tokenizer's model takes at most "
            f"{tokenizer.model_max_length}"
        )
    encoder = build_encoder(config, tokenizer, form)
    if config.chat_template is not None:  # whoever loads the trained model is to speak to it as it was trained
        tokenizer.chat_template = load_text(config.chat_template)

    encoded: dict[str, Dataset] = {}
    cuts: dict[str, Cut] = {}
    for split, rows in splits.items():
        encoded[split], cuts[split] = encode_split(encoder, rows, where, split)
    counts = {split: len(rows) for split, rows in encoded.items()}
    if config.dataset.streaming:
        source = train
        train = RowStream(
            source,
            lambda rows, numbers: prepare_rows(encoder, rows, numbers, f"{where}, train"),
            shuffle_buffer=config.dataset.shuffle_buffer,
            description=f"{where}, train",
        )
    else:
        train = encoded.pop("train")
        if config.packing:
            train = _packed(train, config.max_length)
    return CausalLm(
        config=config,
        evaluation=whole.evaluation,
        seed=whole.training.seed,
        processing=tokenizer,
        encoder=encoder,
        ends=_ends(tokenizer, encoded),
        train=train,
        validation=encoded,
        fingerprint=_fingerprint(encoder, splits, stream),
        description=where,
        rows=counts,
        cuts=cuts,
        texts=splits,
    )


def _tokenizer(whole: Config, config: CausalLmTask, form: RowForm, train: Any, where: str) -> PreTrainedTokenizerBase:
    new = whole.model.new_tokenizer if whole.model.config is not None else None  # a checkpoint brings its own
    if new is None:
        return load_own_tokenizer(whole.model)
    if new.kind != "bpe":
        raise UsageError(f"model.new_tokenizer.kind is {new.kind}, and a causal LM is given a bpe one; set kind: bpe")
    chat = form.name == "messages"
    tokenizer = train_bpe(training_texts(config, form, train, where), new.vocab_size, chat=chat)
    logger.info("a new tokenizer of %d tokens is made from the training split", len(tokenizer))
    return tokenizer


def _ends(tokenizer: PreTrainedTokenizerBase, encoded: dict[str, Dataset]) -> list[int]:
    """The tokenizer's end token, and each special token that a reply ends with in the first rows of a split."""
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    ends = {tokenizer.eos_token_id} - {None}
    for rows in encoded.values():
        for row in rows.select(range(min(ROWS_FOR_ENDS, len(rows)))):
            after = [*row["learned"][1:], row["tokens_cut"] > 0]  # of a row that is cut the last reply has no end
            learned = zip(row["input_ids"], row["learned"], after, strict=True)
            ends |= {token for token, here, next_too in learned if here and not next_too} & special
    return sorted(ends)


def _fingerprint(encoder: Encoder, splits: dict[str, Dataset], stream: str) -> str:
    """Of the columns that are read, of the template, which a file may bring, and of the tokenizer; of a stream a name
    must do."""
    rows = fingerprint({split: rows.select_columns(list(encoder.form.columns)) for split, rows in splits.items()})
    template = encoder.template.text if encoder.template else ""
    return hashlib.sha256(f"{rows} {template} {stream} {tokenizer_hash(encoder.tokenizer)}".encode()).hexdigest()


def _packed(train: Dataset, max_length: int) -> Dataset:
    packed = pack(train, max_length)
    full = sum(packed["length"][:]) / (len(packed) * max_length)
    logger.info(
        "train: %d rows are packed into %d of up to %d tokens, %.1f %% full",
        len(train),
        len(packed),
        max_length,
        100 * full,
    )
    return packed
