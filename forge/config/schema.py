"""The typed, frozen shape of a forge config: every key, its type, its default and what it means.

Every scalar of a YAML file and of `--set` reaches these classes as the text that was written, and the type of
the field decides how it is read: `1e-4` is a number where a number is wanted, `on` stays a word where a name is
wanted. The docstring below a field is its description in `forge config schema`.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from forge.config.fields import Bool, Layers, OpenMap, Positive, Section, Text
from forge.config.former_names import current_metric
from forge.config.teacher_schema import DistillationConfig, TeacherConfig


class DatasetConfig(Section):
    """Where the rows come from: exactly one of name, path and demo."""

    name: Text | None = None
    """A data set on the hub, such as nyu-mll/glue."""
    config: Text | None = None
    """The hub data set's configuration, such as mnli."""
    revision: Text | None = None
    """The hub data set's revision: a commit, a branch or a tag."""
    path: Text | None = None
    """A local folder with train.{jsonl,parquet,csv} and validation*.{jsonl,parquet,csv}; relative to where
    forge runs."""
    demo: Literal["nli", "lines", "chat"] | None = None
    """A data set that forge generates itself: nli, sentence pairs with entailment, neutral, contradiction; lines,
    rendered lines of text for OCR; chat, short conversations for causal LMs."""
    streaming: Bool = False
    """Read the training rows as they come, with training.max_steps: for data too large to be prepared first."""
    shuffle_buffer: Annotated[int, Field(ge=0)] = 0
    """Of a stream: each row is drawn, by the seed, from so many that were read ahead; 0: rows come in their order."""
    train_split: Text = "train"
    """The split that is trained on."""
    validation_splits: list[Text] | None = None
    """The splits that are evaluated; null: every split whose name begins with `validation`."""
    max_rows: Positive | None = None
    """Use only so many rows of each split, at equal distances, for a quick look."""

    @model_validator(mode="after")
    def _one_source(self) -> "DatasetConfig":
        if not (self.name or self.path or self.demo):
            raise ValueError("has no source: set one of task.dataset.name, task.dataset.path and task.dataset.demo")
        return self


class LabelColumns(Section):
    """Which columns of the data set hold the text and the label."""

    text: Text = "text"
    """The column with the text, or with the first sentence of a pair."""
    text_pair: Text | None = None
    """The column with the second sentence; null for single sentences."""
    label: Text = "label"
    """The column with the label: a name, or an integer."""


class ClassificationTask(Section):
    """Sequence classification: a label for a sentence or a pair of sentences."""

    type: Literal["classification"]
    """The kind of task."""
    dataset: DatasetConfig
    columns: LabelColumns = LabelColumns()
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The label names in the order of the data's integers; null: from the data set's own features, or from its rows."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens a row may have; longer rows are cut at the end of the longer sentence, counted and reported."""

    @model_validator(mode="after")
    def _own_demo(self) -> "ClassificationTask":
        return _check_demo(self, "nli")


class ImageColumns(Section):
    """Which columns of the data set hold the image and its transcript."""

    image: Text = "image"
    """The column with the image; in a folder of images, metadata's file_name."""
    text: Text = "text"
    """The column with the transcript."""


class NormalizationConfig(Section):
    """What is done to every transcript before it is learned, and to both sides before they are compared."""

    case: Literal["keep", "lower", "upper"] = "keep"
    """The case of letters."""
    unicode: Literal["keep", "nfc", "nfkc"] = "nfc"
    """The form of composed characters; nfkc also makes full-width letters, ligatures and the like plain."""
    whitespace: Bool = True
    """Runs of white space become one space, and none is left at the ends."""


class ImageConfig(Section):
    """The size that an image is brought to: scaled with its proportions kept, then padded at right and below."""

    height: Positive | None = None
    """In pixels; null: as the model's image processor has it."""
    width: Positive | None = None
    """In pixels; null: as the model's image processor has it."""
    fill: Annotated[int, Field(ge=0, le=255)] = 255
    """The grey of the padding, from 0 (black) to 255 (white)."""
    stretch: Bool = False
    """Scale to height and width whatever the proportions, without padding: what TrOCR's own checkpoints expect."""


class OcrTask(Section):
    """Text recognition: an image of a line, or of more, and its transcript."""

    type: Literal["ocr"]
    """The kind of task."""
    dataset: DatasetConfig
    columns: ImageColumns = ImageColumns()
    max_length: Annotated[int, Field(ge=2)] = 64
    """Tokens a transcript may have; longer ones are cut, counted and reported."""
    normalization: NormalizationConfig = NormalizationConfig()
    image: ImageConfig = ImageConfig()
    prompt: Text | None = None
    """What a chat-style vision-language model is asked beside the image; null for encoder-decoders."""
    num_beams: Positive = 1
    """Beams of the search that reads a line in evaluation; 1: the likeliest token at each place."""
    skip_broken: Bool = False
    """Leave out images that are missing or cannot be decoded, and count them, where an error would name the first."""

    @model_validator(mode="after")
    def _own_demo(self) -> "OcrTask":
        return _check_demo(self, "lines")


class TextColumns(Section):
    """Which columns of the data set hold the text of a causal LM; task.format says which of them count."""

    messages: Text = "messages"
    """The column with conversations: lists of {role, content}."""
    prompt: Text = "prompt"
    """The column with what a completion follows."""
    completion: Text = "completion"
    """The column with the completion, which is learned."""
    text: Text = "text"
    """The column with plain text, which is learned whole."""


class CausalLmTask(Section):
    """Causal language modelling: conversations, prompts with completions, or plain text."""

    type: Literal["causal_lm"]
    """The kind of task."""
    dataset: DatasetConfig
    columns: TextColumns = TextColumns()
    format: Literal["auto", "messages", "prompt_completion", "text"] = "auto"
    """What a row is; auto: what its columns say."""
    chat_template: Text | None = None
    """A file with the chat template (Jinja); null: the tokenizer's own."""
    max_length: Annotated[int, Field(ge=4)] = 1024
    """Tokens a row may have."""
    truncation: Literal["cut", "leave_out", "refuse"] = "cut"
    """What becomes of longer rows: cut at their end, left out, or an error; counted and reported."""
    packing: Bool = False
    """Several training rows share one of max_length, and none of them sees another."""
    append_eos: Bool = True
    """A completion, or a plain text, ends in the end token."""
    remove_text: list[Text] = []
    """Pieces that are taken out of every text, such as end tokens that a data set carries as text."""

    @model_validator(mode="after")
    def _own_demo(self) -> "CausalLmTask":
        return _check_demo(self, "chat")


AnyTask = ClassificationTask | OcrTask | CausalLmTask


def _check_demo(task: Any, own: str) -> Any:
    if task.dataset.demo not in (None, own):
        raise ValueError(f"has the demo data {task.dataset.demo}, and a task of type {task.type} has {own}")
    return task


class LoraConfig(Section):
    """Low-rank adaptation (arXiv 2106.09685) through peft: small matrices are trained beside frozen weights."""

    rank: Positive = 16
    """The rank r of the matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What they add is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on what goes into them."""
    target: Annotated[
        list[Text], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = ["all-linear"]
    """The modules that are adapted: all-linear (all but the head), or names such as [q_proj, v_proj]."""
    modules_to_save: list[Text] = []
    """Modules that are trained in full beside them; those whose weights start new always are."""
    rslora: Bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: Bool = False
    """Train magnitude and direction apart (arXiv 2402.09353)."""


class NewTokenizerConfig(Section):
    """A tokenizer made from the training split, for a model from scratch."""

    kind: Literal["characters", "bpe"]
    """characters: a token for each printable ASCII character and each other one that occurs; bpe: byte-level BPE."""
    vocab_size: Annotated[int, Field(ge=300)] = 2000
    """Tokens of a bpe tokenizer, the 256 bytes among them."""


class ModelConfig(Section):
    """The model that is trained (the student): exactly one of path and config."""

    path: Text | None = None
    """A hub id, a local folder, a run directory (its final model), or package:NAME/FOLDER inside an installed
    package."""
    revision: Text | None = None
    """The hub model's revision: a commit, a branch or a tag."""
    config: OpenMap | None = None
    """Builds a model from scratch: the keys of its transformers config, model_type among them."""
    tokenizer: Text | None = None
    """Where the tokenizer (or processor) comes from, in the forms of path; null: from path."""
    new_tokenizer: NewTokenizerConfig | None = None
    """The alternative to tokenizer: one made from the training split."""
    base: Text | None = None
    """Where path is an adapter: its base, in the forms of path, instead of the one that it names."""
    adapter: Text | None = None
    """An adapter that is merged into path: a folder or a run."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter; null: all weights."""
    continue_adapter: Bool = False
    """Train the adapter that path names on, where it would be merged."""
    keep_layers: Layers | None = None
    """Makes a shallower student: only these layers of path, such as [0, 3], counted from 0; null: all of them."""
    load_in_4bit: Bool = False
    """QLoRA: keep the frozen weights in 4 bits (NF4); needs model.lora, a GPU and bitsandbytes."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The label names in the order of the checkpoint's outputs, where its own config does not name them."""
    new_head: Bool = False
    """Start the classification head afresh even if the checkpoint has one."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Sets every dropout rate of the model; null: as its own config has them."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if not (self.path or self.config):
            raise ValueError("has no source: set model.path, or model.config to build one from scratch")
        if self.config is not None and not self.tokenizer and self.new_tokenizer is None:
            raise ValueError("is built from model.config and needs model.tokenizer, or model.new_tokenizer")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("is built from model.config and needs model.config.model_type, such as bert")
        return self

    @model_validator(mode="after")
    def _adapter_that_can_be(self) -> "ModelConfig":
        adapted = self.lora is not None or self.continue_adapter
        if self.config is not None and adapted:
            raise ValueError("is built from model.config, and an adapter needs a model that can be found again: train "
                             "all weights first, then set model.path to that run")  # fmt: skip
        if self.lora is not None and self.continue_adapter:
            raise ValueError("has two adapters to train: set model.lora for a new one, or model.continue_adapter for "
                             "the one of model.path")  # fmt: skip
        if self.continue_adapter and self.new_head:
            raise ValueError("has both model.continue_adapter and model.new_head: a new head needs a new adapter")
        if self.keep_layers is not None and (adapted or self.load_in_4bit):
            other = "model.lora" if self.lora else "model.continue_adapter" if adapted else "model.load_in_4bit"
            raise ValueError(f"has both {other} and model.keep_layers, and an adapter needs a model that can be found "
                             "again: train all weights first, then set model.path to that run")  # fmt: skip
        if self.load_in_4bit and not adapted:
            raise ValueError("has model.load_in_4bit, which keeps weights frozen: set model.lora beside it")
        return self


class LossConfig(Section):
    """How the loss of a causal LM is computed from its hidden states and head; docs/kernels.md has what each costs."""

    memory_budget_gib: Annotated[float, Field(gt=0)] | None = None
    """GiB of scratch memory that it may take beside its gradients: the fastest plan that fits, or the smallest there
    is; null: 3 on a GPU, and 0.25 where plain torch computes it."""
    low_memory: Bool = False
    """A smaller plan than the fastest, whatever fits: some 30 % less memory at its peak, a little more time."""
    precision: Literal["difference", "fp32", "bf16"] | None = None
    """Of the logits between product and loss, on a GPU: difference, of the two models' logits, as exact as fp32 at half
    of its memory; fp32; bf16, whose gradient is wrong where student and teacher are near each other, and which training
    alone takes: an evaluation never does. null: difference where it can run, else fp32."""


class TrainingConfig(Section):
    """The optimizer, its schedule and the size of a step."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training split; overridden by max_steps."""
    max_steps: Positive | None = None
    """Optimizer steps to train for; null: as many as epochs gives."""
    per_device_batch_size: Positive = 32
    """Rows that go through the model at once on one device."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches of one optimizer step on each device."""
    batch_size: Positive | None = None
    """Rows of one optimizer step over all devices, whatever their number; the accumulation follows from it, with
    per_device_batch_size as the upper bound of a micro-batch. The alternative to gradient_accumulation_steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """The peak rate, reached at the end of the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate goes on after the warm-up: down to 0 in a line or a half cosine, or not at all."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.06
    """The share of all steps in which the rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The alternative to warmup_ratio, in optimizer steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay of matrices and embeddings; biases and norms are not decayed."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The decay of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """The decay of AdamW's second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """The gradient is scaled down to this norm; null: no clipping."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # numpy takes no larger one
    """Seeds new weights, dropout and the order of the rows."""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """auto: bf16 where the device computes in it, else no (float32); what was chosen stands in the log."""
    gradient_checkpointing: Bool = False
    """Recompute activations in backward: less memory, more time."""
    compile: Bool = False
    """Compile each layer of student and teacher with torch.compile: the first steps of each length take long."""
    deterministic: Bool = False
    """Only GPU operations that give the same bits each time: slower, and an error where there is none."""
    length_grouping: Bool = True
    """Rows of similar length share a step: less padding, the same rows in every epoch."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that prepare batches, per rank; 0: the training process itself; null: 2 where images are decoded,
    else 0."""
    loss: LossConfig = LossConfig()

    def step_shape(self, ranks: int) -> tuple[int, int]:
        """Rows of one optimizer step over all ranks, and micro-batches of it on each rank."""
        if self.batch_size is None:
            micro_batches = self.gradient_accumulation_steps
            return self.per_device_batch_size * micro_batches * ranks, micro_batches
        return self.batch_size, math.ceil(self.batch_size / (self.per_device_batch_size * ranks))

    def micro_batch_rows(self, ranks: int) -> int:
        """Rows of the largest micro-batch on that many ranks."""
        rows_per_step, micro_batches = self.step_shape(ranks)
        return min(self.per_device_batch_size, math.ceil(rows_per_step / (ranks * micro_batches)))


class DeepSpeedConfig(Section):
    """DeepSpeed's plans: names of files in ds_configs/ (without .json), or paths of JSON files of your own."""

    student: Text | None = None
    """How the student's training is sharded: zero1, zero2, zero3, ...; null: every device holds all of it (DDP)."""
    teacher: Text = "teacher_zero3"
    """How the teacher is sharded, with teacher.placement: zero3."""


class EvaluationConfig(Section):
    """When the model is evaluated, and on how much."""

    baseline: Bool = True
    """Evaluate before training."""
    final: Bool = True
    """Evaluate after training."""
    every_steps: Positive | None = None
    """Evaluate every so many optimizer steps; null: only before and after."""
    teacher: Bool | None = None
    """Evaluate the teacher too, and compare the student with it: agreement and KL; null: where distillation.alpha is
    not 0."""
    control: Literal["sft"] | None = None
    """sft: train the same student without the teacher as well (alpha 0, the same steps and seed), in a run beside this
    one, and put it into the table at the end."""
    max_rows: Positive | None = None
    """Evaluate only so many rows of each split, chosen by the seed; the metrics say so."""
    shown_texts: Annotated[int, Field(ge=0)] = 4
    """Rows of each split that are shown with the text that the model itself gives, where a task has such."""
    per_device_batch_size: Positive = 64
    """Rows that go through the model at once on one device."""


class CheckpointConfig(Section):
    """When the run saves what it needs to go on."""

    every_steps: Positive | None = 500
    """Save every so many optimizer steps; null: never during training."""
    keep_last: Positive = 2
    """How many checkpoints stay; older ones are deleted once a newer one is committed."""
    keep_best: Bool = True
    """With evaluation.every_steps: save where the evaluation is the best so far, and let that checkpoint stay too."""
    best_metric: Text | None = None
    """What is best, such as matched/accuracy or matched/ce; null: the first validation split's main metric."""
    asynchronous: Bool = False
    """Training goes on while a copy of its state is written; takes that much more memory on the host."""

    @field_validator("best_metric")
    @classmethod
    def _current_name(cls, name: str | None) -> str | None:
        if name is not None and current_metric(name) != name:
            raise ValueError(f"must be {current_metric(name)}, as that metric is now called")
        return name


class ExportConfig(Section):
    """What is written at the end, beside the trained weights."""

    merge: Bool = False
    """Of an adapter: write final/merged too, a whole model that needs neither base nor peft."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in final/ (of final/merged, where an adapter was trained)."""
    push_to_hub: Annotated[Text, Field(pattern=r"^([A-Za-z0-9._-]+/)?[A-Za-z0-9._-]+$")] | None = None
    """Upload final/ to this private repository of the hub, OWNER/NAME or NAME, once the run is complete."""


class LoggingConfig(Section):
    """How often training reports."""

    every_steps: Positive = 10
    """Report every so many optimizer steps: loss and speed since the last report, the last step's rate and norm."""


class WandbConfig(Section):
    """Weights & Biases: the run's config, metadata and metrics; never a reason for training to stop."""

    project: Text = "forge"
    """The W&B project."""
    entity: Text | None = None
    """The W&B team or user; null: your default."""
    group: Text | None = None
    """Groups runs on the dashboard."""
    tags: list[Text] = []
    """Labels of the run on the dashboard."""
    mode: Literal["online", "offline"] = "online"
    """offline: written into the run directory, for `wandb sync` later."""


class TrackingConfig(Section):
    """Where metrics go besides the run directory."""

    wandb: WandbConfig | None = None


class Config(Section):
    """One training run."""

    task: Annotated[AnyTask, Field(discriminator="type")]
    """What is learned, and from which data; its type decides which keys it has."""
    model: ModelConfig
    teacher: TeacherConfig = TeacherConfig()
    distillation: DistillationConfig = DistillationConfig()
    training: TrainingConfig = TrainingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    logging: LoggingConfig = LoggingConfig()
    tracking: TrackingConfig = TrackingConfig()
    output_root: Text = "outputs"
    """The folder that holds all runs; relative to where forge runs."""

    @property
    def wants_teacher(self) -> bool:
        """Is the teacher needed, to train or to be compared with?"""
        return self.distillation.alpha > 0 or self.evaluation.teacher is True


ALTERNATIVES: tuple[tuple[str, ...], ...] = (
    # Of each group one key counts: a later layer that sets one drops the others of earlier layers.
    ("task.dataset.name", "task.dataset.path", "task.dataset.demo"),
    ("model.path", "model.config"),
    ("model.tokenizer", "model.new_tokenizer"),
    ("training.max_steps", "training.epochs"),
    ("training.batch_size", "training.gradient_accumulation_steps"),
    ("training.warmup_steps", "training.warmup_ratio"),
)
