"""The sections of a config about the teacher and what is learned from it."""

from typing import Annotated, Literal

from pydantic import Field

from forge.config.fields import Positive, Section, Text

WHOLE_LOGITS_COLUMNS = 1024  # a cache keeps heads up to this whole: 4 KB a label, where 64 of a top k take 264 bytes

Layer = Annotated[int, Field(ge=0)]


class TeacherConfig(Section):
    """The model that is distilled from; not loaded while distillation.alpha is 0, unless evaluation.teacher asks."""

    path: Text | None = None
    """In the forms of model.path; an adapter is merged into its base."""
    revision: Text | None = None
    """The hub model's revision: a commit, a branch or a tag."""
    base: Text | None = None
    """Where path is an adapter: its base, in the forms of path, instead of the one that it names."""
    adapter: Text | None = None
    """An adapter that is merged into path: a folder or a run."""
    tokenizer: Text | None = None
    """Where its tokenizer (or processor) comes from, in the forms of path; null: from path."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The label names in the order of its outputs, where its own config does not name them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of its weights, and what it computes in; auto: bfloat16 where training.mixed_precision comes to bf16 or fp16,
    else float32."""
    placement: Literal["replicated", "offload", "zero3", "cached"] = "replicated"
    """replicated: whole on every device; offload: in host memory, on the device for its forward alone; zero3: spread
    over all devices, each layer gathered for its forward, with deepspeed.student; cached: not in memory at all, its
    outputs come from the files of `forge cache-teacher`."""
    cache: Text | None = None
    """With placement cached: the folder of those files; null: one below output_root that is named by their content."""
    top_k: Positive = 64
    """With placement cached: how many of the likeliest tokens are kept at each label of a language model."""


class HiddenConfig(Section):
    """Hidden states of the student are drawn to the teacher's, through a learned projection where widths differ."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """What this term is multiplied by; it is added to the loss, whatever alpha > 0 is."""
    kind: Literal["mse", "cosine"] = "mse"
    """mse: squared difference, the mean over the width (arXiv 1909.10351); cosine: 1 - cos (arXiv 1910.01108)."""
    layers: Annotated[dict[Layer, Layer], Field(min_length=1)] | None = None
    """Student's layer: teacher's layer; 0 is the embeddings' output, n that of the n-th layer. null: each layer of the
    student, and the embeddings, at equal distances over the teacher's."""


class RelationsConfig(Section):
    """Self-attention relations of one layer, MiniLM's way (arXiv 2012.15828): how queries (keys, values) of a row
    resemble each other."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """What this term is multiplied by; it is added to the loss, whatever alpha > 0 is."""
    student_layer: Positive | None = None
    """Counted from 1; null: the last."""
    teacher_layer: Positive | None = None
    """Counted from 1; null: the last."""
    heads: Positive = 12
    """Relation heads that the widths of both are split into."""
    of: Annotated[list[Literal["queries", "keys", "values"]], Field(min_length=1)] = ["queries", "keys", "values"]
    """The vectors that are compared; the mean over them."""


class DistillationConfig(Section):
    """loss = (1 - alpha) * CE + alpha * T^2 * D(teacher || student) + hidden terms; alpha 0 is plain supervised
    fine-tuning, without the hidden terms too."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The weight of the teacher; 0: no teacher is loaded."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T: both distributions are softened by it."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "uld"] = "forward_kl"
    """D; docs/losses.md has the formulas. uld is for a teacher with another tokenizer."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of jsd: the teacher's share of the mixture."""
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """lambda of skew_kl (the teacher's share of the mixture) and of skew_reverse_kl (the student's)."""
    missing_mass: Literal["tail", "renormalise", "zero"] = "tail"
    """With a cached top k: what becomes of the probability that it lacks: one more event, spread over the k, or left
    out."""
    hidden: HiddenConfig | None = None
    """Add a loss between hidden states."""
    relations: RelationsConfig | None = None
    """Add a loss between self-attention relations; for encoders."""

    @property
    def aligns_tokens(self) -> bool:
        """Is the teacher one that reads other tokens than the student (ULD)?"""
        return self.alpha > 0 and self.divergence == "uld"
