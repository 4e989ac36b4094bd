"""Finds the linear head of a language model, so that its loss can be computed from hidden states without the logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

PROBE_TOKENS = 8


@dataclass(frozen=True)
class LinearHead:
    """A head: logits = softcap * tanh(scale * linear(hidden) / softcap); without a softcap, scale * linear(hidden)."""

    body: Callable[..., Any]  # the model without its head; returns last_hidden_state (B, T, D)
    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        logits = self.linear(hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: PreTrainedModel, forward_options: dict[str, Any]) -> LinearHead | str:
    """Return the head of a model that reads input_ids, or the reason why its logits are not just a linear head.

    This is tried on a few tokens: an architecture may do more to its logits than its config says.
    """
    linear = _trained(model.get_output_embeddings())
    if type(linear) is not nn.Linear:  # LoRA's layers are other classes: they compute with more than one weight
        return f"its head is {type(linear).__module__}.{type(linear).__name__}"
    text = model.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    head = LinearHead(model.base_model, linear, scale, getattr(text, "final_logit_softcapping", None))
    tokens = torch.arange(PROBE_TOKENS, device=linear.weight.device)[None] % linear.weight.shape[0]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=tokens, **forward_options).logits
            hidden = head.body(input_ids=tokens, **forward_options).last_hidden_state
            agree = torch.allclose(head.logits(hidden), expected, rtol=1e-3, atol=1e-4)
    finally:
        model.train(training)
    return head if agree else f"{type(model).__name__} changes its logits in a way that forge does not know"


def _trained(head: nn.Module | None) -> nn.Module | None:
    """Return the copy of the head that is trained in full next to an adapter, if peft has wrapped the head."""
    if isinstance(head, ModulesToSaveWrapper) and len(head.active_adapters) == 1:
        return head.modules_to_save[head.active_adapters[0]]
    return head
