"""Greedy or beam-search generation that ignores a checkpoint's own settings, and where a model stops."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from forge.ranks.deepspeed import any_partitioned

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@torch.no_grad()
def write(model: PreTrainedModel, inputs: Mapping[str, Tensor], max_new_tokens: int, num_beams: int = 1) -> Tensor:
    """Return what `generate` writes for these inputs, (B, T) int64, without sampling.

    `generate` takes what a call leaves open from model.generation_config, where checkpoints ask for a minimum length,
    penalties, or two texts per row. Only its special tokens are used here: they start, end and pad a text.
    """
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in TOKENS}
    generate: Any = model.generate
    try:
        model.generation_config = GenerationConfig(
            **tokens, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False, use_cache=True
        )
        # Where each rank has a part of every weight, all ranks must continue until the longest text is written.
        together = any_partitioned(model) and torch.distributed.get_world_size() > 1
        written: Tensor = generate(**inputs, generation_config=model.generation_config, synced_gpus=together)
    finally:
        model.generation_config = own
    return written


def end_with(model: PreTrainedModel, ends: Iterable[int], pad: int) -> None:
    """Make generation with the model stop at these tokens, here and wherever its export is loaded."""
    found = sorted(ends)
    model.generation_config.eos_token_id = found[0] if len(found) == 1 else found or None
    model.generation_config.pad_token_id = pad
