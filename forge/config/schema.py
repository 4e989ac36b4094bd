"""The typed, frozen schema of a forge config: every key, its type, its default and its meaning.

Every scalar of a YAML file and of `--set` reaches these classes as the text that was written, and the type of the field
decides how it is read: `1e-4` is a number where a number is expected, `on` stays a word where a name is expected. The
docstring after a field is its description in `forge config schema`.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from forge.config.fields import Bool, Layers, OpenMap, Place, Positive, Section, Text
from forge.config.former_names import current_metric
from forge.config.task_schema import AnyTask
from forge.config.teacher_schema import DistillationConfig, TeacherConfig


class LoraConfig(Section):
    """Low-rank adaptation (arXiv 2106.09685) through peft: small matrices are trained, and the weights stay frozen."""

    rank: Positive = 16
    """The rank of the matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The output of the matrices is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the matrices."""
    target: Annotated[
        list[Text],
        Field(min_length=1, json_schema_extra={"type": ["array", "string"]}),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = ["all-linear"]
    """The modules to adapt: all-linear (all linear layers but the head), or names such as [q_proj, v_proj]."""
    modules_to_save: list[Text] = []
    """Modules to train in full, in addition to the matrices. Modules with new weights always are."""
    rslora: Bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    dora: Bool = False
    """Train magnitude and direction separately (arXiv 2402.09353)."""


class NewTokenizerConfig(Section):
    """A tokenizer that is built from the training split, for a model from scratch."""

    kind: Literal["characters", "bpe"]
    """characters: one token for each printable ASCII character and each other character in the data. bpe: byte-level
    BPE."""
    vocab_size: Annotated[int, Field(ge=300)] = 2000
    """Number of tokens of a bpe tokenizer, including the 256 bytes."""


class ModelConfig(Section):
    """The model to train (the student): exactly one of path and config."""

    path: Place | None = None
    """A hub id, a local folder, a run directory (its final model), or package:NAME/FOLDER inside an installed
    package."""
    revision: Text | None = None
    """The hub model's revision: a commit, a branch or a tag."""
    config: OpenMap | None = None
    """Build a model from scratch: the keys of its transformers config, including model_type."""
    tokenizer: Place | None = None
    """Source of the tokenizer (or processor), in the forms of path. null: path."""
    new_tokenizer: NewTokenizerConfig | None = None
    """Alternative to tokenizer: build one from the training split."""
    base: Place | None = None
    """If path is an adapter: the base to use, in the forms of path, instead of the one that the adapter names."""
    adapter: Place | None = None
    """An adapter to merge into path: a folder or a run."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter. null: train all weights."""
    continue_adapter: Bool = False
    """Continue to train the adapter that path names. false: merge it into its base."""
    keep_layers: Layers | None = None
    """Keep only these layers of path, counted from 0, such as [0, 3], for a shallower student. null: all layers."""
    load_in_4bit: Bool = False
    """QLoRA: keep the frozen weights in 4 bits (NF4). Needs model.lora, a GPU and bitsandbytes."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The label names in the order of the checkpoint's outputs, if its own config does not name them."""
    new_head: Bool = False
    """Initialise a new classification head even if the checkpoint has one."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Set every dropout rate of the model. null: as in its own config."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if not (self.path or self.config):
            raise ValueError("has no source: set model.path, or model.config to build one from scratch")
        if self.config is not None and not self.tokenizer and self.new_tokenizer is None:
            raise ValueError("is built from model.config, so it needs model.tokenizer or model.new_tokenizer")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("is built from model.config, so it needs model.config.model_type, such as bert")
        return self

    @model_validator(mode="after")
    def _possible_adapter(self) -> Self:
        adapted = self.lora is not None or self.continue_adapter
        if self.config is not None and adapted:
            raise ValueError(
                "is built from model.config, but an adapter needs a base that can be loaded again: train all weights "
                "first, then set model.path to that run"
            )
        if self.lora is not None and self.continue_adapter:
            raise ValueError(
                "has two adapters to train: set model.lora for a new one, or model.continue_adapter for that of "
                "model.path"
            )
        if self.continue_adapter and self.new_head:
            raise ValueError("has both model.continue_adapter and model.new_head, but a new head needs a new adapter")
        if self.keep_layers is not None and (adapted or self.load_in_4bit):
            other = "model.lora" if self.lora else "model.continue_adapter" if adapted else "model.load_in_4bit"
            raise ValueError(
                f"has both {other} and model.keep_layers, but an adapter needs a base that can be loaded again: train "
                "all weights first, then set model.path to that run"
            )
        if self.load_in_4bit and not adapted:
            raise ValueError("has model.load_in_4bit, which freezes the weights: set model.lora as well")
        return self


class LossConfig(Section):
    """How the loss of a causal LM is computed from its hidden states and head; docs/kernels.md has the costs."""

    memory_budget_gib: Annotated[float, Field(gt=0)] | None = None
    """GiB of scratch memory for the loss, in addition to its gradients: the fastest chunk sizes that fit are used, or
    the smallest possible. null: 3 on a GPU, 0.25 where plain torch computes the loss."""
    low_memory: Bool = False
    """Use smaller chunks even if larger ones fit: about 30 % less peak memory for a little more time."""
    precision: Literal["difference", "fp32", "bf16"] | None = None
    """Precision of the logits between the matrix product and the loss, on a GPU. difference: the difference of the two
    models' logits, as exact as fp32 with half the memory. fp32. bf16: its gradient is wrong where student and teacher
    are close; used in training only, never in an evaluation. null: difference where it can run, else fp32."""


class TrainingConfig(Section):
    """The optimizer, its schedule and the size of a step."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training split. Ignored if max_steps is set."""
    max_steps: Positive | None = None
    """Optimizer steps to train for. null: as many as epochs gives."""
    per_device_batch_size: Positive = 32
    """Rows per forward pass on one device."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches per optimizer step on each device."""
    batch_size: Positive | None = None
    """Rows per optimizer step over all devices, for any number of devices. The accumulation follows from it, with
    per_device_batch_size as the upper bound of a micro-batch. Alternative to gradient_accumulation_steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """The peak learning rate, reached at the end of the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate after the warm-up: decayed to 0 linearly or by a half cosine, or constant."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.06
    """Share of all steps in which the learning rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Alternative to warmup_ratio, in optimizer steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of matrices and embeddings. Biases and norms are not decayed."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The decay of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """The decay of AdamW's second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient to this norm. null: no clipping."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # numpy takes no larger one
    """Seed of new weights, dropout and the order of the rows."""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """auto: bf16 if the device supports it, else no (float32). The choice is logged."""
    gradient_checkpointing: Bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: Bool = False
    """Compile each layer of student and teacher with torch.compile. The first steps of each length are slow."""
    deterministic: Bool = False
    """Use only GPU operations that give the same bits every time. Slower; an operation without such a version is an
    error."""
    length_grouping: Bool = True
    """Put rows of similar length into one step: less padding, the same rows in every epoch."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes per rank that prepare batches. 0: the training process itself. null: 2 if images are decoded, else
    0."""
    loss: LossConfig = LossConfig()

    def step_shape(self, ranks: int, rows: int | None = None) -> tuple[int, int]:
        """Return the rows per optimizer step over all ranks, and the micro-batches per step on each rank.

        rows: in the training split, which may be fewer than a step asks for: they fill fewer micro-batches.
        """
        at_once = self.per_device_batch_size * ranks
        if self.batch_size is None:
            rows_per_step, micro_batches = at_once * self.gradient_accumulation_steps, self.gradient_accumulation_steps
        else:
            rows_per_step, micro_batches = self.batch_size, math.ceil(self.batch_size / at_once)
        return rows_per_step, micro_batches if rows is None else min(micro_batches, math.ceil(rows / at_once))

    def micro_batch_rows(self, ranks: int) -> int:
        """Return the rows of the largest micro-batch on that many ranks."""
        rows_per_step, micro_batches = self.step_shape(ranks)
        return min(self.per_device_batch_size, math.ceil(rows_per_step / (ranks * micro_batches)))


class DeepSpeedConfig(Section):
    """DeepSpeed plans: names of files in ds_configs/ (without .json), or paths of your own JSON files."""

    student: Place | None = None
    """How the student's training is sharded: zero1, zero2, zero3, ... null: not at all (DDP)."""
    teacher: Place = "teacher_zero3"
    """How the teacher is sharded if teacher.placement is zero3."""


class EvaluationConfig(Section):
    """When the model is evaluated, and on how many rows."""

    baseline: Bool = True
    """Evaluate before training."""
    final: Bool = True
    """Evaluate after training."""
    every_steps: Positive | None = None
    """Evaluate every N optimizer steps. null: only before and after training."""
    teacher: Bool | None = None
    """Evaluate the teacher too, and compare the student with it (agreement and KL). null: if distillation.alpha is not
    0."""
    control: Literal["sft"] | None = None
    """sft: also train the same student without the teacher (alpha 0, same steps and seed), as a second run, and add it
    to the final table."""
    max_rows: Positive | None = None
    """Evaluate at most this many rows of each split, chosen by the seed. The metrics report it. null: all rows."""
    shown_texts: Annotated[int, Field(ge=0)] = 4
    """Rows of each split to show with the text that the model generates, in tasks that generate text."""
    per_device_batch_size: Positive = 64
    """Rows per forward pass on one device."""


class CheckpointConfig(Section):
    """When the run saves what it needs to resume."""

    every_steps: Positive | None = 500
    """Save every N optimizer steps. null: never during training."""
    keep_last: Positive = 2
    """Number of checkpoints to keep. Older ones are deleted after a newer one is committed."""
    keep_best: Bool = True
    """Also save and keep the checkpoint with the best evaluation so far. Needs evaluation.every_steps."""
    best_metric: Text | None = None
    """The metric that picks the best checkpoint, such as matched/accuracy or matched/ce. null: the main metric of the
    first validation split."""
    asynchronous: Bool = False
    """Continue training while a copy of the state is written. Takes host memory for that copy."""

    @field_validator("best_metric")
    @classmethod
    def _current_name(cls, name: str | None) -> str | None:
        if name is not None and current_metric(name) != name:
            raise ValueError(f"must be {current_metric(name)}, as that metric is now called")
        return name


class ExportConfig(Section):
    """What is written at the end, in addition to the trained weights."""

    merge: Bool = False
    """If an adapter is trained: also write final/merged, a whole model that needs neither base nor peft."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the weights in final/ (in final/merged if an adapter was trained)."""
    push_to_hub: Annotated[Text, Field(pattern=r"^([A-Za-z0-9._-]+/)?[A-Za-z0-9._-]+$")] | None = None
    """Upload final/ to this private hub repository, OWNER/NAME or NAME, after the run is complete."""


class LoggingConfig(Section):
    """How often training reports."""

    every_steps: Positive = 10
    """Report every N optimizer steps: loss and speed since the last report, learning rate and gradient norm of the last
    step."""


class WandbConfig(Section):
    """Weights & Biases: the run's config, metadata and metrics. A failure there never stops training."""

    project: Text = "forge"
    """The W&B project."""
    entity: Text | None = None
    """The W&B team or user. null: your default."""
    group: Text | None = None
    """The group of the run on the dashboard."""
    tags: list[Text] = []
    """Labels of the run on the dashboard."""
    mode: Literal["online", "offline"] = "online"
    """offline: write into the run directory, for `wandb sync` later."""


class TrackingConfig(Section):
    """Where metrics go in addition to the run directory."""

    wandb: WandbConfig | None = None


class Config(Section):
    """One training run."""

    task: Annotated[AnyTask, Field(discriminator="type")]
    """What to learn, and from which data. task.type decides which keys there are."""
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
    output_root: Place = "outputs"
    """The folder for all runs, relative to the working directory."""

    @property
    def wants_teacher(self) -> bool:
        """True if the teacher is needed, to train or to compare with."""
        return self.distillation.alpha > 0 or self.evaluation.teacher is True


ALTERNATIVES: tuple[tuple[str, ...], ...] = (
    # One key of each group is used: a later layer that sets one drops the others of earlier layers.
    ("task.dataset.name", "task.dataset.path", "task.dataset.demo"),
    ("model.path", "model.config"),
    ("model.tokenizer", "model.new_tokenizer"),
    ("training.max_steps", "training.epochs"),
    ("training.batch_size", "training.gradient_accumulation_steps"),
    ("training.warmup_steps", "training.warmup_ratio"),
)
