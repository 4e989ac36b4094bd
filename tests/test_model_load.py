"""Models by every name they can have, and heads that fit the data's labels or are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    EsmConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    XLNetConfig,
)

from forge.config.schema import ModelConfig, TrainingConfig
from forge.errors import UsageError
from forge.model.classifier import load_classifier
from forge.model.load import LoadedModel, check_fits, check_limit, set_dropout
from forge.model.source import find_model

LABELS = ["entailment", "neutral", "contradiction"]


def load(tiny_model: Path, data_labels: list[str] = LABELS, **settings: Any) -> LoadedModel:
    config = ModelConfig(**{"path": str(tiny_model), **settings})
    return load_classifier(config, data_labels, AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture
def classifier(tiny_model: Path, tmp_path: Path) -> Path:
    """A trained-looking classifier whose outputs are in another order than the data's labels."""
    config = BertConfig.from_pretrained(tiny_model, num_labels=3)
    config.id2label = {0: "Contradiction", 1: "Entailment", 2: "Neutral"}
    config.label2id = {"Contradiction": 0, "Entailment": 1, "Neutral": 2}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_a_checkpoint_without_a_head_gets_one_in_the_order_of_the_data(tiny_model: Path) -> None:
    loaded = load(tiny_model)

    assert loaded.model.config.id2label == dict(enumerate(LABELS))
    assert loaded.label_ids == [0, 1, 2]
    assert loaded.new_weights == ["classifier.bias", "classifier.weight"]
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_a_checkpoint_with_a_head_keeps_its_order_and_the_data_follows(tiny_model: Path, classifier: Path) -> None:
    loaded = load(tiny_model, path=str(classifier))

    assert loaded.label_ids == [1, 2, 0]
    assert loaded.new_weights == []
    assert loaded.model.config.id2label == {0: "Contradiction", 1: "Entailment", 2: "Neutral"}
    kept = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert torch.equal(loaded.model.classifier.weight, kept.classifier.weight)


def test_half_precision_weights_are_trained_in_float32(tiny_model: Path, classifier: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(classifier).to(torch.bfloat16).save_pretrained(tmp_path / "half")

    assert {p.dtype for p in load(tiny_model, path=str(tmp_path / "half")).model.parameters()} == {torch.float32}


def test_a_head_with_other_labels_is_refused_or_replaced(tiny_model: Path, classifier: Path) -> None:
    with pytest.raises(UsageError, match=r"do not have the same names.*model\.new_head: true"):
        load(tiny_model, ["yes", "no"], path=str(classifier))
    loaded = load(tiny_model, ["yes", "no"], path=str(classifier), new_head=True)

    assert loaded.model.config.id2label == {0: "yes", 1: "no"}
    assert loaded.model.classifier.weight.shape == (2, 32)
    assert loaded.new_weights == ["classifier.bias", "classifier.weight"]


def test_a_new_head_of_the_same_size_really_is_new(tiny_model: Path, classifier: Path) -> None:
    kept = AutoModelForSequenceClassification.from_pretrained(classifier)
    loaded = load(tiny_model, path=str(classifier), new_head=True)

    assert loaded.label_ids == [0, 1, 2]
    assert not torch.equal(loaded.model.classifier.weight, kept.classifier.weight)
    assert torch.equal(loaded.model.bert.pooler.dense.weight, kept.bert.pooler.dense.weight)


def test_a_head_without_names_is_refused_until_they_are_given(tiny_model: Path, tmp_path: Path) -> None:
    for outputs in (3, 2):
        folder = tmp_path / f"nameless{outputs}"
        config = BertConfig.from_pretrained(tiny_model, num_labels=outputs)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        with pytest.raises(UsageError, match=rf"head of {outputs} outputs .* model\.labels"):
            load(tiny_model, path=str(folder))
    named = load(tiny_model, path=str(tmp_path / "nameless3"), labels=["neutral", "entailment", "contradiction"])

    assert named.label_ids == [1, 0, 2]
    with pytest.raises(UsageError, match=r"model\.labels has 3 names, .* 2 outputs"):
        load(tiny_model, path=str(tmp_path / "nameless2"), labels=LABELS)


def test_a_model_is_built_from_scratch_by_its_config_alone(tiny_model: Path) -> None:
    scratch = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    loaded = load(tiny_model, path=None, config=scratch, tokenizer=str(tiny_model))

    assert loaded.source is None
    assert loaded.model.config.vocab_size == 20  # the tokenizer's
    assert loaded.model.classifier.weight.shape == (3, 16)
    with pytest.raises(UsageError, match=r"model\.config\.hidden_sise is not a setting of bert models"):
        load(tiny_model, path=None, config={"model_type": "bert", "hidden_sise": 16}, tokenizer="x")
    for odd in ({"hidden_size": 33}, {"hidden_size": "big"}):  # 33: not divisible by twelve heads
        with pytest.raises(UsageError, match="transformers cannot build a model from this"):
            load(tiny_model, path=None, config={"model_type": "bert", **odd}, tokenizer="x")
    with pytest.raises(UsageError, match="transformers cannot build a model from this"):
        load(tiny_model, path=None, config={"model_type": "bort"}, tokenizer="x")


def test_dropout_sets_every_rate(tiny_model: Path) -> None:
    model = load(tiny_model, dropout=0.25).model

    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    assert model.config.attention_probs_dropout_prob == 0.25


def test_a_decoder_becomes_a_classifier_that_knows_its_padding(tiny_model: Path, tmp_path: Path) -> None:
    GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    loaded = load(tiny_model, path=str(tmp_path))

    assert loaded.model.config.pad_token_id == 0
    assert loaded.new_weights == ["score.weight"]


def test_what_cannot_fit_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    small = BertConfig.from_pretrained(tiny_model, vocab_size=10)
    AutoModelForSequenceClassification.from_config(small).save_pretrained(tmp_path / "small")
    with pytest.raises(UsageError, match="the tokenizer has 20 tokens"):
        load(tiny_model, path=str(tmp_path / "small"), new_head=True)
    with pytest.raises(UsageError, match=r"task\.max_length is 65, .* 64 positions"):
        check_fits(load(tiny_model).model, 65, TrainingConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"model\.path: the folder .*empty has no usable config"):
        load(tiny_model, path=str(tmp_path / "empty"))


def test_roberta_has_fewer_positions_than_its_config_says() -> None:
    config = RobertaConfig(
        **{"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 8, "max_position_embeddings": 66, "pad_token_id": 1},
    )
    model = AutoModelForSequenceClassification.from_config(config)

    check_fits(model, 64, TrainingConfig())
    with pytest.raises(UsageError, match=r"task\.max_length is .* 64 positions"):
        check_fits(model, 65, TrainingConfig())


def test_gradient_checkpointing_is_refused_if_the_model_cannot(tiny_model: Path) -> None:
    model = load(tiny_model).model
    model.supports_gradient_checkpointing = False
    check_fits(model, 32, TrainingConfig())
    with pytest.raises(UsageError, match="BertForSequenceClassification cannot recompute activations"):
        check_fits(model, 32, TrainingConfig(gradient_checkpointing=True))


def test_weights_of_another_architecture_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder)
    BertConfig.from_pretrained(tiny_model).save_pretrained(folder)
    with pytest.raises(UsageError, match=r"lacks weights of bert .*another architecture"):
        load(tiny_model, path=str(folder))


def test_a_run_directory_means_its_final_model(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "training_state.json").write_text("{}")
    with pytest.raises(UsageError, match="which has no final model yet"):
        find_model(str(tmp_path), "model.path")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    assert find_model(str(tmp_path), "model.path").location == str(tmp_path / "final")


def test_a_package_is_found_and_its_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)

    assert find_model("package:some_weights/model", "model.path").location == str(tmp_path / "some_weights/model")
    with pytest.raises(UsageError, match="has no folder weights"):
        find_model("package:some_weights/weights", "model.path")


def test_a_limit_of_minus_one_or_none_is_no_limit(tiny_model: Path) -> None:
    """XLNet's config says -1."""
    config = XLNetConfig(vocab_size=24, d_model=8, n_layer=1, n_head=2, d_inner=8)
    assert config.max_position_embeddings == -1
    check_fits(AutoModelForSequenceClassification.from_config(config), 10_000, TrainingConfig())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for limit in (-1, 0, None):
        tokenizer.model_max_length = limit
        check_limit(10_000, tokenizer, "the model")
    tokenizer.model_max_length = 64
    with pytest.raises(UsageError, match=r"task\.max_length is 65, but the model takes at most 64"):
        check_limit(65, tokenizer, "the model")


@pytest.mark.parametrize("pad", [-1, 5, None])
def test_a_decoder_reads_the_last_token_before_the_padding_of_its_tokenizer(
    pad: int | None, tiny_model: Path, tmp_path: Path
) -> None:
    """With -1, as older configs have it, or with another token, it would read the padding."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(vocab_size=24, pad_token_id=0, **sizes)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": pad}))
    model = load(tiny_model, path=str(tmp_path)).model.eval()
    alone = model(input_ids=torch.tensor([[2, 8, 3]])).logits[0]
    padded = model(input_ids=torch.tensor([[2, 8, 3, 0, 0], [2, 8, 9, 9, 3]])).logits[0]
    assert torch.allclose(alone, padded, atol=1e-6)


def test_a_switch_that_is_called_dropout_is_no_rate() -> None:
    """ESM has token_dropout: true, and refuses a number there."""
    config = EsmConfig(vocab_size=20, token_dropout=True, hidden_dropout_prob=0.3)
    set_dropout(config, 0.0)
    assert (config.token_dropout, config.hidden_dropout_prob) == (True, 0.0)
