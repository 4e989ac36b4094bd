"""Tiny models and adapters on them, for the tests of adapters and of their export."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forge.config.schema import ExportConfig
from forge.model.adapter import attach
from forge.model.origin import Origin, WeightFiles, hashed
from forge.model.weights import AdapterWeights

LABELS = ["entailment", "neutral", "contradiction"]
IDS = torch.tensor([[2, 5, 9, 7, 3, 11], [2, 8, 4, 12, 6, 3]])


def write_llama(folder: Path, *, tied: bool = False, layers: int = 2, seed: int = 0) -> Path:
    """A causal LM of 32 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def llama(folder: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def classifier(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=3,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
        dtype=torch.float32,
    ).eval()


def train(model: nn.Module, seed: int = 1) -> None:
    """Gives the trained parameters values that no initialization has: an adapter that does something."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


def write_adapter(
    model: PreTrainedModel, base: Path, folder: Path, *, below: tuple[Path, ...] = (), seed: int = 1, **settings: Any
) -> Tensor:
    """Puts an adapter on the model, trains it by chance, and writes it; returns what the model then says of IDS.

    below: the adapters that were merged into the base before.
    """
    attach(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}))
    train(model, seed)
    parts = [hashed(WeightFiles(name=str(path), location=str(path))) for path in (base, *below)]
    AdapterWeights(model, Origin(parts[0], tuple(parts[1:]))).export(folder, ExportConfig())
    return logits(model)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=IDS).logits
