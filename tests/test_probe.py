"""A model that cannot do the task is found on a few tokens, when it is loaded, as student and as teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from conversations import conversation
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from forge.config.loader import load_config
from forge.config.schema import ModelConfig, TrainingConfig
from forge.errors import UsageError
from forge.task.load import load_task
from forge.task.probe import check_causal

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=16, initializer_range=0.2, **SMALL))


@pytest.mark.parametrize("key", ["model", "teacher"])
def test_an_encoder_is_refused_as_a_causal_model(load_lm: Any, tmp_path: Path, chat_model: Path, key: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.save_pretrained(tmp_path / "bert")
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SMALL)).save_pretrained(
        tmp_path / "bert"
    )
    task = load_lm([conversation(0)], [conversation(1)])
    with pytest.raises(
        UsageError, match=rf"^{key}: BertLMHeadModel is not causal: changing a token changes the logits"
    ):
        task.load_model(ModelConfig(path=str(tmp_path / "bert")), TrainingConfig(), key)


def test_a_causal_model_passes_also_with_masked_tokens_and_stays_as_it_was() -> None:
    model = small_llama().train()
    check_causal(model, {"use_cache": False}, "model")
    assert model.training
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([3]), -torch.inf)
    )
    check_causal(model, {"use_cache": False}, "model")


def beside(module: Any, inputs: Any, logits: Tensor) -> Tensor:
    """Logits that depend on the other rows of the batch, as with experts of a fixed capacity."""
    return logits + logits.mean(0, keepdim=True) * (len(logits) > 1)


def test_logits_that_depend_on_the_batch_or_a_loss_of_other_labels_are_refused() -> None:
    model = small_llama()
    model.lm_head.register_forward_hook(beside)
    with pytest.raises(UsageError, match="LlamaForCausalLM gives a row other logits next to a longer row"):
        check_causal(model, {"use_cache": False}, "model")
    model = small_llama()
    model.loss_function = lambda logits, labels, **_: torch.nn.functional.cross_entropy(logits[0], labels[0])
    with pytest.raises(
        UsageError, match=r"has a loss of its own \(.*\) that is not the cross-entropy of the next tokens"
    ):
        check_causal(model, {"use_cache": False}, "model")


@pytest.mark.parametrize(("side", "refused"), [("left", True), ("right", False)])
def test_a_classifier_that_counts_its_padding_is_refused(
    tmp_path: Path, chat_model: Path, side: str, refused: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model, padding_side=side)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    width = {"n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, pad_token_id=tokenizer.pad_token_id, **width)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    llama = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **SMALL)
    LlamaForSequenceClassification(llama).save_pretrained(tmp_path / "llama")
    rows = [{"text": "red " * (1 + i % 3), "label": i % 2} for i in range(6)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    (tmp_path / "c.yaml").write_text(
        f"task: {{type: classification, dataset: {{path: {tmp_path / 'data'}}}, max_length: 32}}\n"
        f"model: {{path: {tmp_path / 'gpt2'}, new_head: true}}\ntraining: {{max_steps: 1}}\n"
    )
    config = load_config(tmp_path / "c.yaml", ()).config
    task = load_task(config)
    relative = ModelConfig(path=str(tmp_path / "llama"), new_head=True, tokenizer=str(tmp_path / "gpt2"))
    task.load_model(relative, config.training)
    if refused:
        with pytest.raises(UsageError, match=r"pads on the left, and its positions count .* by model.tokenizer$"):
            task.load_model(config.model, config.training)
    else:
        task.load_model(config.model, config.training)


def test_a_classifier_that_mixes_rows_of_a_batch_is_reported(
    tiny_model: Path, config_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification

    config = load_config(config_file, ()).config
    task = load_task(config)
    task.load_model(config.model, config.training)
    assert "next to a longer row" not in caplog.text
    real = BertForSequenceClassification.forward

    def forward(self: Any, **inputs: Any) -> Any:
        result = real(self, **inputs)
        result.logits = result.logits + result.logits.mean() * inputs["input_ids"].shape[1]
        return result

    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    task.load_model(config.model, config.training)
    assert "model: BertForSequenceClassification gives a row other logits next to a longer row" in caplog.text
