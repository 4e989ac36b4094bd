"""The sections `teacher` and `distillation` of a config."""

from typing import Annotated, Literal

from pydantic import Field

from forge.config.fields import Place, Positive, Section, Text

WHOLE_LOGITS_COLUMNS = 1024  # a cache keeps all logits of heads up to this width: 4 KB per label; a top 64 is 264 B

Layer = Annotated[int, Field(ge=0)]


class TeacherConfig(Section):
    """The model to distil from. Not loaded if distillation.alpha is 0, unless evaluation.teacher is true."""

    path: Place | None = None
    """A model in the forms of model.path. An adapter is merged into its base."""
    revision: Text | None = None
    """The hub model's revision: a commit, a branch or a tag."""
    base: Place | None = None
    """If path is an adapter: the base to use, in the forms of path, instead of the one that the adapter names."""
    adapter: Place | None = None
    """An adapter to merge into path: a folder or a run."""
    tokenizer: Place | None = None
    """Source of the tokenizer (or processor), in the forms of path. null: path."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """The label names in the order of the teacher's outputs, if its own config does not name them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the weights and of the computation. auto: bfloat16 if training.mixed_precision results in bf16 or
    fp16, else float32."""
    placement: Literal["replicated", "offload", "zero3", "cached"] = "replicated"
    """replicated: whole on every device. offload: in host memory, on the device only during its forward pass. zero3:
    sharded over all devices, each layer gathered for its forward pass; needs deepspeed.student. cached: not in memory,
    its outputs are read from the files of `forge cache-teacher`."""
    cache: Place | None = None
    """With placement cached: the folder of those files. null: a folder in output_root, named by their content."""
    top_k: Positive = 64
    """With placement cached: number of most probable tokens to keep per label of a language model."""


class HiddenConfig(Section):
    """Hidden states of the student are matched to the teacher's, through a learned projection if widths differ."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """The factor of this term, which is added to the loss for any alpha > 0."""
    kind: Literal["mse", "cosine"] = "mse"
    """mse: squared difference, averaged over the width (arXiv 1909.10351). cosine: 1 - cos (arXiv 1910.01108)."""
    layers: Annotated[dict[Layer, Layer], Field(min_length=1)] | None = None
    """Map of student layer to teacher layer. 0 is the output of the embeddings, n that of the n-th layer. null: the
    embeddings and every layer of the student, spread evenly over the teacher's."""


class RelationsConfig(Section):
    """Self-attention relations of one layer as in MiniLM (arXiv 2012.15828): how similar the queries (keys, values) of
    a row are to each other."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """The factor of this term, which is added to the loss for any alpha > 0."""
    student_layer: Positive | None = None
    """The layer, counted from 1. null: the last."""
    teacher_layer: Positive | None = None
    """The layer, counted from 1. null: the last."""
    heads: Positive = 12
    """Number of relation heads into which the widths of both models are split."""
    of: Annotated[list[Literal["queries", "keys", "values"]], Field(min_length=1)] = ["queries", "keys", "values"]
    """The vectors to compare. The term is averaged over them."""


class DistillationConfig(Section):
    """loss = (1 - alpha) * CE + alpha * T^2 * D(teacher || student) + hidden terms. alpha 0 is plain supervised
    fine-tuning, also without the hidden terms."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The weight of the teacher. 0: no teacher is loaded."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T: the temperature that softens both distributions."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "uld"] = "forward_kl"
    """D: docs/losses.md has the formulas. uld is for a teacher with another tokenizer."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """For jsd: the teacher's share of the mixture."""
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """For skew_kl: the teacher's share of the mixture. For skew_reverse_kl: the student's."""
    missing_mass: Literal["tail", "renormalise", "zero"] = "tail"
    """How the probability outside a cached top k is handled: as one more event, spread over the k, or left out."""
    hidden: HiddenConfig | None = None
    """Add a loss between hidden states."""
    relations: RelationsConfig | None = None
    """Add a loss between self-attention relations. For encoders."""

    @property
    def aligns_tokens(self) -> bool:
        """True if the teacher reads other tokens than the student (ULD)."""
        return self.alpha > 0 and self.divergence == "uld"
