"""What the tests of distillation share: classifiers and chat models that teach."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

LABELS = ["entailment", "neutral", "contradiction"]


def write_classifier(folder: Path, tiny_model: Path, *, seed: int = 1, names: list[str] | None = None) -> Path:
    """The tiny model with another head, sure of itself, whose outputs have these names in this order."""
    names = names or ["contradiction", "entailment", "neutral"]
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=len(names))
    with torch.no_grad():
        model.classifier.weight.normal_(0, 2.0)
        model.bert.pooler.dense.weight.normal_(0, 0.5)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    _copy_tokenizer(tiny_model, folder)
    return folder


def write_chat_teacher(folder: Path, chat_model: Path, *, columns: int | None = None) -> Path:
    """A wider Llama with the tokenizer of the chat model; columns: of its head, of which some may be padding."""
    torch.manual_seed(5)
    own = LlamaConfig.from_pretrained(chat_model)
    config = LlamaConfig(
        **{"vocab_size": columns or own.vocab_size, "hidden_size": 48, "intermediate_size": 64},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3},
        **{"max_position_embeddings": 96, "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _copy_tokenizer(chat_model, folder)
    return folder


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
