"""What a frozen teacher tells of a batch, and the form in which every placement gives it."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedModel

from forge.model.head import LinearHead
from forge.task.batches import Batch, teacher_inputs

# N is the number of the batch's label positions, in the order of batch["positions"]; where the two models read
# different tokens (ULD), of its aligned places, in the order of batch["teacher_aligned"]. One of three forms:
#   logits (N, Vt)                            where the student's loss has whole logits as well
#   hidden (N, Ht), head (Vt, Ht)[, head_bias (Vt,)]     for a student whose loss is computed from hidden states
#   top_log_probs (N, K), top_indices (N, K)  of a cache: log-probabilities at the temperature that was asked for
# and, where they were asked for, hidden_states.L (B, T, Dt) of each layer L.
TeacherOutputs = dict[str, Tensor]


class Teacher(ABC):
    """A teacher in one of its placements."""

    logit_scale: float = 1.0  # of what hidden and head give
    softcap: float | None = None
    whole_logits: bool = False  # the student's loss takes no hidden states

    @abstractmethod
    def outputs(self, batch: Batch, split: str | None, temperature: float) -> TeacherOutputs:
        """Of a batch on the device, without gradients and in the teacher's own dtype. split: of task.validation, whose
        rows these are; None: those that are trained on. temperature: at which a top k is wanted."""


class ModelTeacher(Teacher):
    """A teacher that is computed, from a model in memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward_options: dict[str, Any],
        *,
        layers: tuple[int, ...] = (),
        head: LinearHead | None = None,
        columns: list[int] | None = None,
    ):
        """model: placed, in its dtype. layers: whose hidden states are wanted, 0 for the embeddings' output. head: of
        this model, where it is known to be one matrix. columns: of a classifier, the teacher's output for each of the
        student's; None: the same ones."""
        self.model = model.eval()
        self.forward_options = forward_options
        self.layers, self.head, self.columns = layers, head, columns
        if head is not None:
            self.logit_scale, self.softcap = head.scale, head.softcap

    @torch.no_grad()
    def outputs(self, batch: Batch, split: str | None, temperature: float) -> TeacherOutputs:
        """The same for every split and temperature."""
        options = {**self.forward_options, **({"output_hidden_states": True} if self.layers else {})}
        inputs = as_dtype(teacher_inputs(batch), self.model.dtype)
        positions = batch.get("teacher_aligned", batch["positions"])
        if self.head is not None and not self.whole_logits:
            result = self.head.body(**inputs, **options)
            hidden = result.last_hidden_state.flatten(0, -2)[positions]  # (N, Ht)
            with align_module_device(self.head.linear):  # offloaded: outside its forward it has no weight
                outputs = {"hidden": hidden, "head": self.head.linear.weight.detach()}
                if self.head.linear.bias is not None:
                    outputs["head_bias"] = self.head.linear.bias.detach()
        else:
            result = self.model(**inputs, **options)
            logits = result.logits.flatten(0, -2)[positions]  # (N, Vt)
            outputs = {"logits": logits if self.columns is None else logits[:, self.columns]}
        states = hidden_states_of(result) if self.layers else ()
        return outputs | {f"hidden_states.{layer}": states[layer] for layer in self.layers}


def as_dtype(inputs: Batch, dtype: torch.dtype) -> Batch:
    """Images in the dtype of the model that reads them; ids and masks as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def hidden_states_of(result: Any) -> tuple[Tensor, ...]:
    """Of a model's output: (B, T, D) of the embeddings and of each layer; of an encoder-decoder the decoder's."""
    states = getattr(result, "decoder_hidden_states", None)
    return tuple(states if states is not None else result.hidden_states)
