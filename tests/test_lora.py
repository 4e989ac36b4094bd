"""LoRA in training: what is trained, what a checkpoint holds, and that a resumed run ends with the same bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import IDS, classifier, llama, logits, write_llama
from conftest import forge, forge_on_two_ranks
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from forge.attempt.resume import ResumePoint, check_base
from forge.checkpoint.manifest import Manifest
from forge.config.loader import load_config
from forge.config.schema import LoraConfig, ModelConfig
from forge.errors import ConfigError, UsageError
from forge.model.adapter import adapter_config, adapter_tensors
from forge.model.load import LoadedModel, read_checkpoint
from forge.model.lora import with_lora
from forge.model.source import ModelSource
from forge.run.files import read_json

Build = Callable[..., Any]
LORA = ("model.lora.rank=4", "checkpoint.every_steps=2", "checkpoint.keep_last=3")


def adapted(model: Any, new_weights: tuple[str, ...] = (), seed: int = 7, **settings: Any) -> LoadedModel:
    loaded = LoadedModel(model, None, list(new_weights), [])
    return with_lora(loaded, ModelConfig(path="m", lora=LoraConfig(**settings)), seed)


def trained_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_only_the_adapter_and_the_new_head_are_trained(build_trainer: Build) -> None:
    trainer = build_trainer(*LORA)
    names = trained_names(trainer.model)
    assert all(".lora_A." in name or ".lora_B." in name or name.startswith("classifier.modules") for name in names)
    assert sum(name.startswith("classifier.modules_to_save") for name in names) == 2
    before = state_of(trainer)
    trainer.train()
    changed = {name for name, tensor in state_of(trainer).items() if not torch.equal(tensor, before[name])}
    assert changed == set(names)
    assert len(trainer.optimizer.state) == len(names)  # and no state of what is frozen


def test_a_checkpoint_holds_the_adapter_alone_and_peft_loads_it(build_trainer: Build, tiny_model: Path) -> None:
    trainer = build_trainer(*LORA)
    trainer.train()
    folder = trainer.attempt.run.path / "checkpoint-6"
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "base.json", "config.json"),
        *("optimizer.pt", "rng-00000.pt", "state.json", "manifest.json"),
    }
    saved = load_file(folder / "adapter_model.safetensors")
    assert not any("base_layer" in name or "embeddings" in name for name in saved)
    assert set(saved) == {
        f"base_model.model.{name.replace('.modules_to_save.default', '').replace('.default', '')}"
        for name in trained_names(trainer.model)
    }
    loaded = PeftModel.from_pretrained(classifier(tiny_model), folder)
    assert torch.equal(logits(loaded), logits(trainer.model))

    manifest = Manifest.read(folder)
    assert manifest.base == json.loads((folder / "base.json").read_text())["base"]["sha256"]
    assert len(torch.load(folder / "optimizer.pt")["optimizer"]["state"]) == len(saved)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.parametrize("kind", [(), ("model.lora.dora=true", "model.lora.rslora=true")])
def test_a_resumed_adapter_ends_bit_identical(asynchronous: str, kind: tuple[str, ...], build_trainer: Build) -> None:
    """With dropout in the model and in the adapter."""
    settings = (*LORA, *kind, "model.dropout=0.1", "model.lora.dropout=0.1")
    unbroken = build_trainer(*settings, f"checkpoint.asynchronous={asynchronous}")
    unbroken.train()
    resumed = build_trainer(*settings)
    resumed.restore(unbroken.attempt.run.path / "checkpoint-2")
    assert resumed.state.step == 2
    resumed.train()

    own, expected = state_of(resumed), state_of(unbroken)
    assert list(own) == list(expected)
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert [r["loss"] for r in resumed.attempt.callbacks.reports] == [
        r["loss"] for r in unbroken.attempt.callbacks.reports[2:]
    ]
    names = ("adapter_model.safetensors", "adapter_config.json", "base.json", "config.json")
    for name in names:
        one, other = (trainer.attempt.run.path / "checkpoint-6" / name for trainer in (unbroken, resumed))
        assert one.read_bytes() == other.read_bytes()


def test_initial_weights_depend_only_on_the_seed(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m")

    def first(seed: int, drawn: int) -> dict[str, torch.Tensor]:
        torch.rand(drawn)
        return adapter_tensors(adapted(llama(folder), seed=seed).model)

    one, same, other = first(3, 1), first(3, 5), first(4, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)
    assert not any(one[name].any() for name in one if "lora_B" in name)  # at first it changes nothing


def test_all_linear_means_every_linear_layer_except_the_head(tmp_path: Path) -> None:
    model = adapted(llama(write_llama(tmp_path / "m", layers=1))).model
    layers = {name.partition(".lora_A")[0] for name in trained_names(model) if ".lora_A." in name}
    block = "model.layers.0"
    assert layers == {
        *(f"{block}.self_attn.{name}_proj" for name in "qkvo"),
        *(f"{block}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }


def test_modules_frozen_by_the_task_get_no_adapter(tmp_path: Path) -> None:
    model = llama(write_llama(tmp_path / "m"))
    model.model.layers[1].mlp.requires_grad_(False)
    trained = trained_names(adapted(model).model)
    assert not [name for name in trained if "layers.1.mlp" in name]
    assert len([name for name in trained if "layers.0.mlp" in name]) == 6


def test_an_encoder_decoder_learns_through_an_adapter() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = adapted(T5ForConditionalGeneration(config), target=["q", "v"], modules_to_save=["lm_head"]).model
    assert {name.split(".")[0] for name in trained_names(model)} == {"encoder", "decoder", "lm_head"}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_running_statistics_that_no_adapter_holds_are_refused() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    with pytest.raises(UsageError, match=r"normalizes over batches \(resnet\.embedder\.embedder\.normalization\)"):
        adapted(ResNetForImageClassification(config), target=["convolution"])


def test_recomputed_activations_change_no_number(build_trainer: Build) -> None:
    plain, recomputed = (build_trainer(*LORA, f"training.gradient_checkpointing={value}") for value in ("no", "yes"))
    plain.train()
    recomputed.train()
    assert recomputed.model.is_gradient_checkpointing
    for one, other in zip(plain.attempt.callbacks.reports, recomputed.attempt.callbacks.reports, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_every_setting_reaches_peft(tmp_path: Path) -> None:
    settings = {"rank": 3, "alpha": 5, "dropout": 0.25, "rslora": True, "dora": True, "target": ["q_proj"]}
    loaded = adapted(llama(write_llama(tmp_path / "m")), modules_to_save=["lm_head"], **settings)
    config = adapter_config(loaded.model)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
    assert (config.use_rslora, config.use_dora, config.modules_to_save) == (True, True, ["lm_head"])
    assert loaded.model.model.layers[0].self_attn.q_proj.scaling["default"] == pytest.approx(5 / 3**0.5)
    assert loaded.facts()["trained_parameters"] == sum(
        parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad
    )
    assert loaded.adapter is not None
    assert loaded.adapter.model_dump() == {"rank": 3, "alpha": 5, "trained_in_full": ["lm_head"], "continues": None}


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"target": ["query"]}, "target"), ({"modules_to_save": ["query"]}, "modules_to_save")],
)
def test_an_unknown_target_is_refused_with_the_names_that_exist(
    settings: dict[str, Any], key: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        adapted(llama(write_llama(tmp_path / "m")), **settings)
    text = str(error.value)
    assert text.startswith(f"model.lora.{key}: no module of LlamaForCausalLM is named query; the names are: ")
    names = text.partition("the names are: ")[2].split(", ")
    assert {"q_proj", "k_proj", "down_proj", "lm_head"} <= set(names)
    assert len(names) == len(set(names))  # each once, however many layers have it


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("config: {model_type: bert}, tokenizer: t, lora: {rank: 1}", "model.config, but an adapter needs a base"),
        ("path: m, lora: {rank: 1}, continue_adapter: yes", "has two adapters to train"),
        ("path: m, continue_adapter: yes, new_head: yes", "a new head needs a new adapter"),
        ("path: m, load_in_4bit: yes", "model.load_in_4bit, .*: set model.lora"),
    ],
)
def test_what_cannot_go_together_is_a_config_error(model: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"task: {{type: classification, dataset: {{path: d}}}}\nmodel: {{{model}}}\n")
    with pytest.raises(ConfigError, match=sentence):
        load_config(file)


def test_4_bits_are_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    source = ModelSource("nothing", str(tmp_path / "nothing"), in_4bit=True)
    with pytest.raises(UsageError, match=r"model.load_in_4bit needs the package bitsandbytes"):
        read_checkpoint(AutoModelForSequenceClassification, source, None, "model", "weights")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"model.load_in_4bit needs a GPU"):
        read_checkpoint(AutoModelForSequenceClassification, source, None, "model", "weights")


def test_a_checkpoint_on_another_base_is_refused(build_trainer: Build) -> None:
    trainer = build_trainer(*LORA)
    trainer.train()
    folder = trainer.attempt.run.path / "checkpoint-6"
    manifest = Manifest.read(folder)
    point = ResumePoint(2, folder, manifest)
    check_base(point, manifest.base)
    with pytest.raises(UsageError) as error:
        check_base(point, "f" * 64)
    assert f"the adapter are {'f' * 12}," in str(error.value)
    assert f"was trained on {manifest.base[:12]}; restore those" in str(error.value)


def test_a_run_that_starts_again_from_other_weights_is_refused() -> None:
    """Before its first checkpoint only its metadata know what it began with; all weights trained or an adapter."""
    point = ResumePoint(2, weights="a" * 64)
    check_base(point, None, "a" * 64)
    check_base(point, None, None)  # not known
    check_base(ResumePoint(), None, "b" * 64)
    with pytest.raises(UsageError, match=f"the weights of the model are {'b' * 12}, .*{'a' * 12}"):
        check_base(point, None, "b" * 64)


def test_a_module_trained_in_full_gets_no_adapter(tmp_path: Path) -> None:
    model = adapted(llama(write_llama(tmp_path / "m")), target=["lm_head", "q_proj"], modules_to_save=["lm_head"]).model
    assert adapter_config(model).target_modules == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert not any("lm_head" in name and "lora" in name for name, _ in model.named_parameters())


def test_a_new_weight_outside_any_module_is_refused(tmp_path: Path) -> None:
    model = llama(write_llama(tmp_path / "m"))
    model.alone = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UsageError, match=r"model.lora: alone .* module of LlamaForCausalLM"):
        adapted(model, ("alone",))


def test_an_adapter_that_does_not_fit_is_not_restored(build_trainer: Build) -> None:
    small = build_trainer(*LORA)
    small.train()
    large = build_trainer(*LORA, "model.lora.rank=8")
    with pytest.raises(RuntimeError, match="size mismatch"):
        large.restore(small.attempt.run.path / "checkpoint-6")
    fewer = build_trainer(*LORA, "model.lora.target=[query]")
    with pytest.raises(RuntimeError, match="tensors of the adapter do not fit the model"):
        fewer.restore(small.attempt.run.path / "checkpoint-6")


def test_two_ranks_train_the_adapter_that_one_does(config_file: Path, tmp_path: Path) -> None:
    settings = ("--config", config_file, "--set", "model.lora.rank=4", "--set", "evaluation.baseline=false")
    one = forge(*settings, "--run_name", "one")
    two = forge_on_two_ranks(*settings, "--run_name", "two")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    finals = [tmp_path / "outputs" / "tiny" / name / "final" for name in ("one", "two")]
    left, right = (load_file(final / "adapter_model.safetensors") for final in finals)
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)
    assert read_json(finals[1].parent / "run_metadata.json")["world"]["ranks"] == 2
