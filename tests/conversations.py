"""What the tests of causal LMs share: a tiny chat model, rows of conversations, and a config on them."""

from pathlib import Path
from typing import Any

import torch
from conftest import write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from forge.config.loader import load_config
from forge.config.schema import Config
from forge.losses.cross_entropy import IGNORE
from forge.task.causal_lm.bpe import train_bpe
from forge.task.causal_lm.task import CausalLm

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "tree"]
END = "<|im_end|>"


def conversation(i: int, turns: int = 1) -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        word = WORDS[(i + turn) % 10]
        messages += [{"role": "user", "content": f"say {word} {i}"}, {"role": "assistant", "content": f"{word} {i}"}]
    return {"messages": messages}


LONG = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "cat " * 60}]}
LOST = {"messages": [{"role": "user", "content": "dog " * 60}, {"role": "assistant", "content": "red"}]}


def write_chat_model(folder: Path) -> Path:
    """A Llama of two layers with a chat tokenizer."""
    texts = [f"say {word} 123 user assistant: " for word in WORDS] * 5
    tokenizer = train_bpe(texts, 340, chat=True)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96},
        **{"initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config_on(
    folder: Path, model: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], *settings: str
) -> Config:
    write_rows(folder / "data" / "train.jsonl", train)
    write_rows(folder / "data" / "validation.jsonl", validation)
    file = folder / "c.yaml"
    file.write_text(
        f"task: {{type: causal_lm, dataset: {{path: {folder / 'data'}}}, max_length: 64}}\nmodel: {{path: {model}}}\n"
        f"training: {{max_steps: 4, batch_size: 8, learning_rate: 1e-3, mixed_precision: no}}\n"
        f"logging: {{every_steps: 1}}\noutput_root: {folder / 'outputs'}\n"
    )
    return load_config(file, settings).config


def labels_as_text(task: CausalLm, rows: list[dict[str, Any]]) -> list[str]:
    labels = task.collate(rows)["labels"]
    return [str(task.processing.decode(row[row != IGNORE])) for row in labels]


def whole_length(task: CausalLm, row: dict[str, Any]) -> int:
    text = task.processing.apply_chat_template(row["messages"], tokenize=False)
    return len(task.processing(text, add_special_tokens=False)["input_ids"])
