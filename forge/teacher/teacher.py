"""A frozen teacher: what it gives for a batch, the same from every placement, and which of its layers are matched."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from forge.config.teacher_schema import DistillationConfig
from forge.data.batches import Batch, teacher_inputs
from forge.errors import UsageError
from forge.model.attention import attention_modules, capture_outputs, width_of
from forge.model.head import LinearHead
from forge.model.layers import compile_layers
from forge.model.load import LoadedModel
from forge.model.origin import Origin
from forge.ranks.deepspeed import Gathering
from forge.task.task import Task

# N is the number of label positions in the batch, in the order of batch["positions"]. Where the two models read
# different tokens (ULD), it is the number of aligned positions, in the order of batch["teacher_aligned"]. The outputs
# have one of three forms:
#   logits (N, Vt)                            if the student's loss has whole logits as well
#   hidden (N, Ht), head (Vt, Ht)[, head_bias (Vt,)]     for a student whose loss is computed from hidden states
#   top_log_probs (N, K), top_indices (N, K)  from a cache: log-probabilities at the requested temperature
# Training rows also have, if requested: hidden_states.L (B, T, Dt) for each layer L, and
# relations.{queries,keys,values} (B, T, Dt) of one layer.
TeacherOutputs = dict[str, Tensor]


class Teacher(ABC):
    """A teacher in its placement, ready to be asked for its outputs."""

    logit_scale: float = 1.0  # multiplies the logits made of hidden and head
    softcap: float | None = None
    whole_logits: bool = False  # set by the trainer: the student's loss takes no hidden states
    layers: tuple[int, ...] = ()  # set by the trainer: whose hidden states to return; 0 is the embeddings' output
    origin: Origin | None = None  # the files that its weights came from; None: not known
    loaded: LoadedModel | None = None  # the model that computes the outputs; None: it is not in memory
    head: LinearHead | None = None  # of that model, if it is a single matrix

    @abstractmethod
    def outputs(self, batch: Batch, split: str | None, temperature: float) -> TeacherOutputs:
        """Return the outputs for a batch on the device, without gradients and in the teacher's own dtype.

        Args:
            split: The split of task.validation that the rows belong to; None for training rows.
            temperature: The temperature of a top k.
        """

    def hidden_widths(self, batch: Batch) -> tuple[int, ...]:
        """Return the widths of all hidden states that `layers` may name: the embeddings' output, then each layer's.

        batch is any batch on the device. Raises UsageError if this teacher has no hidden states.
        """
        raise UsageError(
            "distillation.hidden: this teacher does not return hidden states; set teacher.placement: replicated"
        )

    def request_relations(self, layer: int | None, kinds: Sequence[str]) -> dict[str, int]:
        """Have the outputs include these vectors of one self-attention layer, and return their widths.

        layer counts from 1; None is the last. Raises UsageError if this teacher cannot return them.
        """
        raise UsageError("distillation.relations: this teacher does not return them; set teacher.placement: replicated")

    def parameters(self) -> Iterable[Tensor]:
        """Return the weights of the model; none if the outputs come from files."""
        return ()

    def compile(self) -> None:  # noqa: B027 - files have nothing to compile
        """Compile the model's layers, if there is a model."""

    def close(self) -> None:  # noqa: B027 - most teachers hold nothing to give back
        """Release what would outlive the teacher; it is not used afterwards."""


class TeacherSource(ABC):
    """A teacher that was found and checked, but not placed yet: a model in host memory, or files with its outputs."""

    origin: Origin | None  # the files that its weights came from; None: not known
    label_ids: list[int]  # of a classifier: for each label of the data, the index of the teacher's output
    model: PreTrainedModel | None = None  # in host memory, in float32; None: it was not loaded

    @property
    def weights_sha256(self) -> str | None:
        """The hash of the teacher's weights; None if it is not known."""
        return self.origin.weights_sha256 if self.origin is not None else None

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the section `teacher` of run_metadata.json."""

    @abstractmethod
    def place(self, accelerator: Accelerator, task: Task, columns: list[int] | None) -> Teacher:
        """Return the teacher where the config wants it. All ranks call it together.

        columns is for classifiers: for each output of the student, the index of the teacher's output; None if both
        have the same order.
        """


class TeacherModule(nn.Module):
    """The forward of a teacher's model, whole or without its head: the module that is prepared for sharded weights."""

    def __init__(self, model: PreTrainedModel, head: LinearHead | None):
        super().__init__()
        self.model = model
        self.head = head
        self.at_head = Gathering(*(() if head is None else head.linear.parameters(recurse=False)))

    def forward(self, inputs: Batch, options: dict[str, Any], whole: bool) -> tuple[Any, list[Tensor]]:
        """Return the model's output; with a head and without `whole`, the body's output and the head's parameters.

        The parameters are [weight] or [weight, bias]. Those of a sharded head are gathered once, and live as long as
        the caller holds them.
        """
        if self.head is None or whole:
            return self.model(**inputs, **options), []
        result = self.head.body(**inputs, **options)
        linear = self.head.linear
        with align_module_device(linear):  # an offloaded head has no weight outside its own forward
            # Not before the body's forward: a sharded weight that is read elsewhere is gathered there, each time.
            return result, self.at_head(lambda: [weight.detach() for weight in linear.parameters(recurse=False)])


class ModelTeacher(Teacher):
    """A teacher whose outputs are computed by a model in memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward_options: dict[str, Any],
        *,
        head: LinearHead | None = None,
        columns: Tensor | None = None,
        module: nn.Module | None = None,
        loaded: LoadedModel | None = None,
    ):
        """Wrap a model that was placed, in its dtype.

        Args:
            head: The head of this model, if it is known to be a single matrix.
            columns: For classifiers: the teacher's output for each of the student's, int64 on the device; None if
                both have the same order.
            module: The prepared TeacherModule of model and head; None if nothing is sharded.
            loaded: What is known of the model; needed only to evaluate the teacher itself.
        """
        self.model = model.eval()
        self.module = TeacherModule(model, head) if module is None else module
        self.forward_options = forward_options
        self.head, self.columns = head, columns
        self.loaded, self.origin = loaded, None if loaded is None else loaded.origin
        self._attention: dict[str, str] = {}  # the modules whose outputs become relations.{…}
        if head is not None:
            self.logit_scale, self.softcap = head.scale, head.softcap

    @torch.no_grad()
    def outputs(self, batch: Batch, split: str | None, temperature: float) -> TeacherOutputs:
        """Return the outputs for a batch; the temperature has no effect."""
        trains = split is None
        layers = self.layers if trains else ()
        options = {**self.forward_options, **hidden_state_options(layers)}
        with capture_outputs(self.model, self._attention if trains else {}) as captured:
            outputs, result = self._at_labels(batch, options)
        states = hidden_states_of(result) if layers else ()
        outputs |= {f"hidden_states.{layer}": states[layer] for layer in layers}
        return outputs | {f"relations.{kind}": vectors for kind, vectors in captured.items()}

    @torch.no_grad()
    def hidden_widths(self, batch: Batch) -> tuple[int, ...]:
        """Return the widths of the embeddings' output and of each layer's, from a forward on this batch."""
        inputs = as_dtype(teacher_inputs(batch), self.model.dtype)
        result, _ = self.module(inputs, {**self.forward_options, "output_hidden_states": True}, True)
        return tuple(states.shape[-1] for states in hidden_states_of(result))

    def request_relations(self, layer: int | None, kinds: Sequence[str]) -> dict[str, int]:
        """Capture these vectors in every forward on training rows, and return their widths."""
        found = attention_modules(self.model, layer, "teacher")
        self._attention = {kind: found[kind] for kind in kinds}
        return {kind: width_of(self.model, name) for kind, name in self._attention.items()}

    def parameters(self) -> Iterable[Tensor]:
        """Return the model's weights, also those that are offloaded or sharded."""
        return self.model.parameters()

    def compile(self) -> None:
        """Compile the model's layers in place."""
        compile_layers(self.model)

    def close(self) -> None:
        """Destroy the DeepSpeed engine of a sharded teacher, which would live on."""
        destroy = getattr(self.module, "destroy", None)
        if destroy is not None:
            destroy()

    def _at_labels(self, batch: Batch, options: dict[str, Any]) -> tuple[TeacherOutputs, Any]:
        """Return the outputs at the label positions, and the model's own output with all that the options request."""
        inputs = as_dtype(teacher_inputs(batch), self.model.dtype)
        positions = batch.get("teacher_aligned", batch["positions"])
        result, weights = self.module(inputs, options, self.whole_logits)
        if weights:
            hidden = result.last_hidden_state.flatten(0, -2)[positions].to(weights[0].dtype)  # (N, Ht)
            outputs = {"hidden": hidden, **dict(zip(("head", "head_bias"), weights, strict=False))}
        else:
            logits = result.logits.flatten(0, -2)[positions]  # (N, Vt)
            outputs = {"logits": logits if self.columns is None else logits.index_select(1, self.columns)}
        return outputs, result


def as_dtype(inputs: Batch, dtype: torch.dtype) -> Batch:
    """Return the inputs with images in the dtype of the model that reads them, and ids and masks unchanged."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def hidden_states_of(result: Any) -> tuple[Tensor, ...]:
    """Return the hidden states in a model's output, each (B, T, D): the embeddings', then each layer's.

    Those of an encoder-decoder are the decoder's. The last is what the head reads: if a norm follows the layers, it is
    that norm's output.
    """
    states = getattr(result, "decoder_hidden_states", None)
    return tuple(states if states is not None else result.hidden_states)


def hidden_state_options(layers: Sequence[int]) -> dict[str, Any]:
    """Return the forward option for the hidden states of these layers; a model that supports it keeps no others."""
    return {"output_hidden_states": list(layers)} if layers else {}


def hidden_widths(model: PreTrainedModel, inputs: Batch, forward_options: dict[str, Any]) -> tuple[int, ...]:
    """Return the widths of the hidden states that a forward gives: the embeddings' output, then each layer's."""
    result = model(**inputs, **forward_options, output_hidden_states=True)
    return tuple(states.shape[-1] for states in hidden_states_of(result))


def teacher_layers(config: DistillationConfig, student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """Return the teacher's layers whose hidden states are matched, ascending; none if no hidden states are compared.

    student_depth counts only if the config does not name the pairs.
    """
    if config.hidden is None or config.alpha == 0:
        return ()
    given = config.hidden.layers
    pairs = layer_map(given, max(given) if given is not None else student_depth, teacher_depth)
    return tuple(sorted(set(pairs.values())))


def layer_map(given: Mapping[int, int] | None, student_depth: int, teacher_depth: int) -> dict[int, int]:
    """Return, for each layer of the student that is matched, the teacher's layer; 0 is the embeddings' output.

    If none are given, each layer i from 0 on is matched to round(i * teacher_depth / student_depth), with halves
    rounded to even. Raises UsageError for a layer that does not exist.
    """
    if given is None:
        return {layer: round(layer * teacher_depth / student_depth) for layer in range(student_depth + 1)}
    for layer, target in given.items():
        for whose, index, depth in (("student", layer, student_depth), ("teacher", target, teacher_depth)):
            if not 0 <= index <= depth:
                raise UsageError(
                    f"distillation.hidden.layers matches the student's layer {layer} to the teacher's layer {target}, "
                    f"but the {whose} has no layer {index}: the student has {student_depth} layers and the teacher "
                    f"{teacher_depth}, counted from 1; 0 is the embeddings' output"
                )
    return dict(sorted(given.items()))


def known_depth(config: PreTrainedConfig) -> int | None:
    """Return the number of layers (of an encoder-decoder: the decoder's); None if the config does not declare it."""
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)


def required_depth(config: PreTrainedConfig) -> int:
    """Return the number of layers; raise UsageError if the model's config does not declare it."""
    layers = known_depth(config)
    if layers is None:
        raise UsageError(
            f"distillation.hidden needs the number of layers, but the config of {config.model_type} does not declare "
            "num_hidden_layers; remove distillation.hidden"
        )
    return layers
