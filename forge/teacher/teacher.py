"""What a frozen teacher tells of a batch, and the form in which every placement gives it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.data.batches import Batch, teacher_inputs
from forge.errors import UsageError
from forge.model.attention import attention_modules, listening, width_of
from forge.model.head import LinearHead
from forge.ranks.deepspeed import Gathering

# N is the number of the batch's label positions, in the order of batch["positions"]; where the two models read
# different tokens (ULD), of its aligned places, in the order of batch["teacher_aligned"]. One of three forms:
#   logits (N, Vt)                            where the student's loss has whole logits as well
#   hidden (N, Ht), head (Vt, Ht)[, head_bias (Vt,)]     for a student whose loss is computed from hidden states
#   top_log_probs (N, K), top_indices (N, K)  of a cache: log-probabilities at the temperature that was asked for
# and, for rows that are trained on, where they were asked for: hidden_states.L (B, T, Dt) of each layer L;
# relations.{queries,keys,values} (B, T, Dt) of one layer.
TeacherOutputs = dict[str, Tensor]


class Teacher(ABC):
    """A teacher in one of its placements."""

    logit_scale: float = 1.0  # of what hidden and head give
    softcap: float | None = None
    whole_logits: bool = False  # the student's loss takes no hidden states
    layers: tuple[int, ...] = ()  # whose hidden states are wanted; 0: the embeddings' output

    @abstractmethod
    def outputs(self, batch: Batch, split: str | None, temperature: float) -> TeacherOutputs:
        """Of a batch on the device, without gradients and in the teacher's own dtype. split: of task.validation, whose
        rows these are; None: those that are trained on. temperature: at which a top k is wanted."""

    def hidden_widths(self, batch: Batch) -> tuple[int, ...]:
        """Of the hidden states of the embeddings and of each layer: what `layers` may ask for. batch: any, on the
        device. Raises UsageError where it tells none."""
        raise UsageError("distillation.hidden: this teacher tells no hidden states; set teacher.placement: replicated")

    def want_relations(self, layer: int | None, kinds: Sequence[str]) -> dict[str, int]:
        """Asks for these vectors of a self-attention layer (from 1; None: the last), and tells their widths.

        Raises UsageError where there are none."""
        raise UsageError("distillation.relations: this teacher tells none; set teacher.placement: replicated")

    def close(self) -> None:  # noqa: B027 - most hold nothing that outlives them
        """It is asked no more."""


class TeacherModule(nn.Module):
    """The forward of a teacher's model, whole or below its head: what is prepared where the weights are sharded."""

    def __init__(self, model: PreTrainedModel, head: LinearHead | None):
        super().__init__()
        self.model = model
        self.head = head
        self.at_head = Gathering(*(() if head is None else head.linear.parameters(recurse=False)))

    def forward(self, inputs: Batch, options: dict[str, Any], whole: bool) -> tuple[Any, list[Tensor]]:
        """The model's output, or, where it has a head and whole is false, that of the model below it, with the head's
        weight and bias; those of a sharded head are gathered, once, and live as long as somebody holds them."""
        if self.head is None or whole:
            return self.model(**inputs, **options), []
        result = self.head.body(**inputs, **options)
        linear = self.head.linear
        with align_module_device(linear):  # offloaded: outside its forward it has no weight
            # Not before: whoever asks for a sharded weight elsewhere has it gathered there, each time, and held.
            return result, self.at_head(lambda: [weight.detach() for weight in linear.parameters(recurse=False)])


class ModelTeacher(Teacher):
    """A teacher that is computed, from a model in memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward_options: dict[str, Any],
        *,
        head: LinearHead | None = None,
        columns: Tensor | None = None,
        module: nn.Module | None = None,
    ):
        """model: placed, in its dtype. head: of this model, where it is known to be one matrix. columns: of a
        classifier, the teacher's output for each of the student's, int64 on the device; None: the same ones. module:
        a TeacherModule of the two, as it was prepared; None: nothing is sharded."""
        self.model = model.eval()
        self.module = TeacherModule(model, head) if module is None else module
        self.forward_options = forward_options
        self.head, self.columns = head, columns
        self._attention: dict[str, str] = {}  # the modules whose outputs are relations.{…}
        if head is not None:
            self.logit_scale, self.softcap = head.scale, head.softcap

    @torch.no_grad()
    def outputs(self, batch: Batch, split: str | None, temperature: float) -> TeacherOutputs:
        """The same for every temperature."""
        trains = split is None
        layers = self.layers if trains else ()
        options = {**self.forward_options, **hidden_state_options(layers)}
        with listening(self.model, self._attention if trains else {}) as heard:
            outputs, result = self._at_labels(batch, options)
        states = hidden_states_of(result) if layers else ()
        outputs |= {f"hidden_states.{layer}": states[layer] for layer in layers}
        return outputs | {f"relations.{kind}": vectors for kind, vectors in heard.items()}

    @torch.no_grad()
    def hidden_widths(self, batch: Batch) -> tuple[int, ...]:
        inputs = as_dtype(teacher_inputs(batch), self.model.dtype)
        result, _ = self.module(inputs, {**self.forward_options, "output_hidden_states": True}, True)
        return tuple(states.shape[-1] for states in hidden_states_of(result))

    def want_relations(self, layer: int | None, kinds: Sequence[str]) -> dict[str, int]:
        found = attention_modules(self.model, layer, "teacher")
        self._attention = {kind: found[kind] for kind in kinds}
        return {kind: width_of(self.model, name) for kind, name in self._attention.items()}

    def close(self) -> None:
        destroy = getattr(self.module, "destroy", None)  # of an engine of DeepSpeed, which would live on
        if destroy is not None:
            destroy()

    def _at_labels(self, batch: Batch, options: dict[str, Any]) -> tuple[TeacherOutputs, Any]:
        """The outputs at the label positions, and the model's own output with what else the options ask for."""
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
    """Images in the dtype of the model that reads them; ids and masks as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def hidden_states_of(result: Any) -> tuple[Tensor, ...]:
    """Of a model's output: (B, T, D) of the embeddings and of each layer; of an encoder-decoder the decoder's.

    The last is what the head reads: with a norm behind its layers, that norm's output.
    """
    states = getattr(result, "decoder_hidden_states", None)
    return tuple(states if states is not None else result.hidden_states)


def hidden_state_options(layers: Sequence[int]) -> dict[str, Any]:
    """The option of a forward that gives the hidden states of these layers; a model that can keeps no others."""
    return {"output_hidden_states": list(layers)} if layers else {}


def hidden_widths(model: PreTrainedModel, inputs: Batch, forward_options: dict[str, Any]) -> tuple[int, ...]:
    """Of the hidden states of the embeddings and of each layer, as a forward in eval mode gives them."""
    result = model(**inputs, **forward_options, output_hidden_states=True)
    return tuple(states.shape[-1] for states in hidden_states_of(result))
