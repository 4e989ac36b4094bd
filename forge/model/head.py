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
    """logits = softcap * tanh(scale * linear(hidden) / softcap), without the softcap where there is none."""

    body: Callable[..., Any]  # the model below its head; gives last_hidden_state (B, T, D)
    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., D). Returns (..., V)."""
        logits = self.linear(hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: PreTrainedModel, forward_options: dict[str, Any]) -> LinearHead | str:
    """The head of a model that reads input_ids, or why it has none that is known to be all of its logits.

    Whether it is, a few tokens tell: an architecture may do more to its logits than any config says.
    """
    linear = _trained(model.get_output_embeddings())
    if type(linear) is not nn.Linear:  # LoRA's layers are other classes, and more than their weight
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
    return head if agree else f"{type(model).__name__} does more to its logits than forge knows of"


def _trained(head: nn.Module | None) -> nn.Module | None:
    """The layer that is trained in full beside an adapter, where peft has put one over the head."""
    if isinstance(head, ModulesToSaveWrapper) and len(head.active_adapters) == 1:
        return head.modules_to_save[head.active_adapters[0]]
    return head
