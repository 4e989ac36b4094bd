"""Lets a model write the likeliest text, whatever its files say of generation, and tells it where to stop."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from forge.ranks.deepspeed import any_partitioned

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@torch.no_grad()
def write(model: PreTrainedModel, inputs: Mapping[str, Tensor], max_new_tokens: int, num_beams: int = 1) -> Tensor:
    """What generate gives for these inputs, (B, T) int64: nothing is drawn, and the model's own tokens end a text.

    generate fills what a call leaves open from model.generation_config, where checkpoints ask for a least length, for
    penalties, or for two texts a row; all but its special tokens is put aside meanwhile.
    """
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in TOKENS}
    generate: Any = model.generate
    try:
        model.generation_config = GenerationConfig(
            **tokens, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False, use_cache=True
        )
        # Where each rank has a part of every weight, all of them must go on until the longest text is written.
        together = any_partitioned(model) and torch.distributed.get_world_size() > 1
        written: Tensor = generate(**inputs, generation_config=model.generation_config, synced_gpus=together)
    finally:
        model.generation_config = own
    return written


def end_with(model: PreTrainedModel, ends: Iterable[int], pad: int) -> None:
    """Whatever generates with the model, here or where it is exported to, stops at these tokens."""
    found = sorted(ends)
    model.generation_config.eos_token_id = found[0] if len(found) == 1 else found or None
    model.generation_config.pad_token_id = pad
