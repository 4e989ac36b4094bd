"""The export: of an adapter, of a merged model that computes the same, of other dtypes, in shards, and to the hub."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import IDS, classifier, llama, logits, write_adapter, write_llama
from peft import LoraConfig
from pydantic import ValidationError
from recorded_runs import model_facts, task_facts
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    PreTrainedModel,
)

import forge.model.export as exports
from forge.config.schema import ExportConfig, ModelConfig
from forge.errors import TrainingError
from forge.model.adapter import attach, config_of_base, merge, untie
from forge.model.export import MergeProof, export_merged, export_model, push_to_hub
from forge.model.load import LoadedModel, read_checkpoint
from forge.model.origin import Origin, WeightFiles, hashed
from forge.model.source import load_model_config, model_source, origin_of
from forge.model.weights import AdapterWeights, AllWeights
from forge.report.model_card import usage
from forge.run.metadata import Merged

ADAPTER = {"rank": 2, "alpha": 4, "trained_in_full": [], "continues": None}


def merged(
    trained: PreTrainedModel,
    base: Path,
    adapter: Path,
    dtype: str = "float32",
    *below: Path,
    auto: Any = AutoModelForCausalLM,
    counted: torch.Tensor | None = None,
) -> Merged:
    origin = Origin(
        hashed(WeightFiles(name="base", location=str(base))),
        tuple(WeightFiles(name=path.name, location=str(path)) for path in below),
    )
    return export_merged(adapter, origin, trained, dtype, MergeProof(auto, {"input_ids": IDS}, counted))


def dtypes_in(folder: Path) -> set[str]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - no dict
    return found


KINDS = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "r": 4},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "module in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_merged_model_computes_what_the_adapter_does(kind: str, tied: bool, tmp_path: Path) -> None:
    """Also where the adapter changes one of two layers that share their weight."""
    base = write_llama(tmp_path / "base", tied=tied)
    model = llama(base)
    expected = write_adapter(model, base, tmp_path / "adapter", **KINDS[kind])
    assert (expected - logits(llama(base))).abs().max() > 0.1  # the adapter does something
    model.train()
    found = merged(model, base, tmp_path / "adapter")
    assert model.training  # the proof leaves the trained model as it was
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "merged")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert found.largest_difference < 1e-4
    assert found.largest_logit == pytest.approx(expected.abs().max().item(), rel=1e-4)
    assert found.rows == len(IDS)
    shared = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert shared == (tied and kind in ("lora", "rslora", "dora"))
    assert loaded.config.tie_word_embeddings == shared


def test_a_classifiers_new_head_is_merged(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["query", "pooler.dense"], "modules_to_save": ["classifier"]}
    model = classifier(tiny_model)
    expected = write_adapter(model, tiny_model, tmp_path / "adapter", **settings)
    merged(model, tiny_model, tmp_path / "adapter", auto=AutoModelForSequenceClassification)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter" / "merged")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert loaded.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


def test_stacked_adapters_are_merged_one_after_the_other(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    model = llama(base)
    write_adapter(model, base, tmp_path / "first")
    merged(model, base, tmp_path / "first")
    between = llama(tmp_path / "first" / "merged")
    expected = write_adapter(between, base, tmp_path / "second", below=(tmp_path / "first",), seed=2)
    merged(between, base, tmp_path / "second", "float32", tmp_path / "first")
    torch.testing.assert_close(logits(llama(tmp_path / "second" / "merged")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["head", "embeddings", "embeddings in full", "module in full"])
def test_a_stack_whose_first_adapter_unties_the_base_is_merged_and_loads_as_the_card_says(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    """The base's files hold one weight for two layers; to the second adapter the two are different."""
    base, first, top = write_llama(tmp_path / "base", tied=True), tmp_path / "first", tmp_path / "top"
    write_adapter(llama(base), base, first, **KINDS[kind])
    loaded = on_it(first)
    expected = write_adapter(loaded.model, base, top, below=(first,), seed=2, target_modules=["v_proj"])
    assert json.loads((top / "base_config.json").read_text())["tie_word_embeddings"] is True  # as the base's files are

    merged(loaded.model, base, top, dtype, first)
    whole = llama(top / "merged")
    assert whole.config.tie_word_embeddings is False
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0, "atol": 0.1 * expected.abs().max()}
    torch.testing.assert_close(logits(whole), expected, **close)
    again = on_it(top)  # by forge, and now as a card's reader
    torch.testing.assert_close(logits(again.model), expected, rtol=1e-4, atol=1e-4)
    model = model_facts(**loaded.facts() | {"adapter": ADAPTER})
    lines = usage(task_facts(auto_model="AutoModelForCausalLM"), model, None).splitlines()
    code = [line for line in lines if "tokenizer" not in line and "```" not in line]
    scope: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoConfig": AutoConfig}
    exec("\n".join(code).replace("PATH OF THIS FOLDER", str(top)), scope)
    torch.testing.assert_close(logits(scope["model"]), expected, rtol=1e-4, atol=1e-4)


def test_untying_is_recorded_in_the_config_and_remembered(tmp_path: Path) -> None:
    model = llama(write_llama(tmp_path / "base", tied=True))
    attach(model, LoraConfig(target_modules=["lm_head"]))
    untie(model)
    assert model.lm_head.base_layer.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    untie(model)  # a second adapter's merge: what the base's files hold is still known
    assert config_of_base(model).tie_word_embeddings is True


def test_what_the_base_ties_is_remembered_over_two_merges() -> None:
    """Here three layers share one weight: one is untied for each of two adapters."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=20, max_position_embeddings=16, **sizes, **heads))
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    for target in ("lm_head", "decoder.embed_tokens"):
        merge(attach(model, LoraConfig(target_modules=[target])))
    assert model.model.decoder.embed_tokens.weight is not model.model.encoder.embed_tokens.weight
    assert (model.config.tie_word_embeddings, config_of_base(model).tie_word_embeddings) == (False, True)


def on_it(adapter: Path) -> LoadedModel:
    """The model that a run on top of this adapter trains."""
    source = model_source(ModelConfig(path=str(adapter)), "model")
    config = load_model_config(source, "model.path")
    read = read_checkpoint(AutoModelForCausalLM, source, config, "model", "weights")
    return LoadedModel(read.model, source, read.missing, [], origin=origin_of(source, "model"))


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_a_merged_model_takes_its_dtype_and_the_rounding_is_measured(dtype: str, stored: str, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", tied=True)
    model = llama(base)
    expected = write_adapter(model, base, tmp_path / "adapter")
    found = merged(model, base, tmp_path / "adapter", dtype)
    folder = tmp_path / "adapter" / "merged"
    assert dtypes_in(folder) == {stored}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    difference = (logits(llama(folder)) - expected).abs().max().item()
    assert found.largest_difference == pytest.approx(difference, rel=1e-3)
    assert found.before_rounding < 1e-4 < found.largest_difference < 0.1 * found.largest_logit


def test_a_merge_that_loses_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_llama(tmp_path / "base", tied=True)
    trained = llama(base)
    write_adapter(trained, base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with monkeypatch.context() as patch:  # as peft merges alone: into the weight that the embeddings share
        patch.setattr("forge.model.adapter.untie", lambda model: None)
        with pytest.raises(TrainingError, match=r"merging the adapter changed the logits by .*export.merge=false"):
            merged(trained, base, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "merged").exists()

    def forgets(model: PreTrainedModel, folder: Path, dtype: str) -> None:
        model.model.layers[1].mlp.up_proj.weight.data.mul_(0.9)
        export_model(model, folder, dtype)

    monkeypatch.setattr(exports, "export_model", forgets)
    with pytest.raises(TrainingError, match="writing the merged model to merged changed the logits"):
        merged(trained, base, tmp_path / "adapter")


def test_the_merged_model_must_be_the_trained_one(tmp_path: Path) -> None:
    """Two models that were built from the same wrong base would agree with each other."""
    base = write_llama(tmp_path / "base")
    trained = llama(base)
    trained_base = llama(base).state_dict()
    write_adapter(trained, base, tmp_path / "adapter")
    write_llama(base, seed=3)
    with pytest.raises(TrainingError, match=r"reading base and adapter again changed the logits by up to"):
        merged(trained, base, tmp_path / "adapter")

    slightly = {name: tensor * 1.002 for name, tensor in trained_base.items()}  # more than float32 rounds on the CPU
    save_file(slightly, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"reading base and adapter again changed the logits by up to"):
        merged(trained, base, tmp_path / "adapter")

    tensors = {name: tensor for name, tensor in llama(base).state_dict().items() if "lm_head" not in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"neither base nor the adapter has lm_head.weight \(1 weights in all\)"):
        merged(trained, base, tmp_path / "adapter")


def test_numbers_out_of_range_are_an_error(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    model = llama(base)
    model.model.norm.weight.data[0] = 1e5  # float16 ends at 65504
    model.save_pretrained(base)
    write_adapter(model, base, tmp_path / "adapter")
    with pytest.raises(TrainingError, match=r"model.norm.weight holds 1e\+05, .* float16; .*=bfloat16"):
        merged(model, base, tmp_path / "adapter", "float16")
    with pytest.raises(TrainingError, match="out of range for float16"):
        export_model(model, tmp_path / "whole", "float16")
    assert not (tmp_path / "adapter" / "merged").exists()
    assert not (tmp_path / "whole").exists()
    merged(model, base, tmp_path / "adapter", "bfloat16")


def test_nan_logits_fail_the_proof_unless_they_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_llama(tmp_path / "base")
    model = llama(base)
    model.model.embed_tokens.weight.data[int(IDS[0, 1])] = float("nan")  # which the first row reads, and no other
    model.save_pretrained(base)
    write_adapter(model, base, tmp_path / "adapter")
    with pytest.raises(TrainingError, match="changed the logits by up to nan"):
        merged(model, base, tmp_path / "adapter")
    counted = torch.zeros_like(IDS, dtype=torch.bool)
    counted[1] = True
    merged(model, base, tmp_path / "adapter", counted=counted)

    monkeypatch.setitem(exports.ROUNDING, "bfloat16", 1e-6)
    with pytest.raises(TrainingError, match="rounding to bfloat16 changed the logits by up to"):
        merged(model, base, tmp_path / "adapter", "bfloat16", counted=counted)


def test_the_gathered_weights_of_a_sharded_model_are_exported_in_their_dtype(tmp_path: Path) -> None:
    model = llama(write_llama(tmp_path / "base"))
    state = {name: tensor.to(torch.bfloat16) + 1 for name, tensor in model.state_dict().items()}
    assert AllWeights(model).export(tmp_path / "half", ExportConfig(dtype="bfloat16"), state=state) is None
    assert dtypes_in(tmp_path / "half") == {"BF16"}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_an_adapter_is_exported_in_float32_and_merges_only_if_asked(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    model = llama(base)
    write_adapter(model, base, tmp_path / "first")
    adapter, whole = AdapterWeights(model, Origin(hashed(WeightFiles(name="b", location=str(base))))), AllWeights(model)
    asked = [ExportConfig(dtype="bfloat16", merge=wanted) for wanted in (False, True)]
    assert [adapter.export_dtype(settings) for settings in asked] == ["float32", "float32"]
    assert [whole.export_dtype(settings) for settings in asked] == ["bfloat16", "bfloat16"]
    assert [weights.merges(settings) for weights in (adapter, whole) for settings in asked] == [
        False,
        True,
        False,
        False,
    ]
    proof = MergeProof(AutoModelForCausalLM, {"input_ids": IDS})
    assert adapter.export(tmp_path / "alone", asked[0], proof=proof) is None
    assert not (tmp_path / "alone" / "merged").exists()
    merged = adapter.export(tmp_path / "both", asked[1], proof=proof)
    assert merged is not None
    assert (merged.dtype, dtypes_in(tmp_path / "both"), dtypes_in(tmp_path / "both" / "merged")) == (
        "bfloat16",
        {"F32"},
        {"BF16"},
    )


def test_an_exported_adapter_and_its_merged_model_stop_where_the_trained_model_does(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    model = llama(base)
    model.generation_config.eos_token_id = 7  # as a task sets it
    write_adapter(model, base, tmp_path / "adapter")
    merged(model, base, tmp_path / "adapter")
    assert GenerationConfig.from_pretrained(base).eos_token_id != 7
    for folder in (tmp_path / "adapter", tmp_path / "adapter" / "merged"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == 7


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_are_exported_in_the_dtype_asked_for(tied: bool, tmp_path: Path) -> None:
    model = llama(write_llama(tmp_path / "base", tied=tied))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tmp_path / "half", "bfloat16")
    assert dtypes_in(tmp_path / "half") == {"BF16"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")  # in the dtype of its config
    assert loaded.dtype == torch.bfloat16
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name].to(torch.bfloat16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # left as it was
    assert model.config.dtype != torch.bfloat16


def test_large_weights_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exports.SHARD == "5GB"
    monkeypatch.setattr(exports, "SHARD", "8KB")
    base = write_llama(tmp_path / "base")
    export_model(llama(base), tmp_path / "out", "float32")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].startswith("model-00001-of-")
    torch.testing.assert_close(logits(llama(tmp_path / "out")), logits(llama(base)))


class FakeHub:
    """As much of the hub's API as an upload needs."""

    def __init__(self, error: Exception | None = None, private: bool = True):
        self.error, self.private, self.calls = error, private, []

    def create_repo(self, name: str, **settings: Any) -> Any:
        self.calls.append(("create_repo", name, settings))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(repo_id=f"me/{name}")

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **settings: Any) -> None:
        self.calls.append(("upload_folder", settings["repo_id"], settings["folder_path"]))


def test_an_upload_makes_a_private_repository(tmp_path: Path) -> None:
    hub = FakeHub()
    assert push_to_hub(tmp_path, "model", hub)
    assert hub.calls == [
        ("create_repo", "model", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/model", tmp_path),
    ]


def test_a_failed_upload_is_logged_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert not push_to_hub(tmp_path, "me/model", FakeHub(ConnectionError("no route\nto the hub")))
    logged = "\n".join(record.message for record in caplog.records)
    assert "could not be uploaded to me/model (ConnectionError: no route to the hub)" in logged
    assert f"hf upload me/model {tmp_path}" in logged
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_nothing_is_uploaded_to_a_public_repository(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub = FakeHub(private=False)
    assert not push_to_hub(tmp_path, "me/model", hub)
    assert [call[0] for call in hub.calls] == ["create_repo"]
    assert "the repository is public, and forge uploads to private ones only" in caplog.text


@pytest.mark.parametrize("name", ["a/b/c", "/tmp/model", "me/my model", "me/"])
def test_an_impossible_repository_name_is_refused_at_the_start(name: str) -> None:
    assert ExportConfig(push_to_hub="me/my.model-2_b").push_to_hub == "me/my.model-2_b"
    with pytest.raises(ValidationError, match="push_to_hub"):
        ExportConfig(push_to_hub=name)


def test_the_very_commit_of_a_hub_model_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the adapter's config, in the card and when the base is read again, whatever the branch has by then."""
    base = write_llama(tmp_path / "base")
    model = llama(base)
    write_adapter(model, base, tmp_path / "adapter")
    below = Origin(WeightFiles(name="org/m", location="org/m", revision="main", commit="c" * 40))
    assert json.loads(AdapterWeights(model, below).texts()["adapter_config.json"])["revision"] == "c" * 40

    read = []
    monkeypatch.setattr(exports, "read_checkpoint", lambda auto, source, *_: read.append(source) or 1 / 0)
    proof = MergeProof(AutoModelForCausalLM, {"input_ids": IDS})
    with pytest.raises(ZeroDivisionError):
        export_merged(tmp_path / "adapter", below, model, "float32", proof)
    assert read[0].revision == "c" * 40

    facts = model_facts(location="org/m", commit="c" * 40, revision="main", adapter=ADAPTER)
    text = usage(task_facts(auto_model="AutoModelForCausalLM"), facts, None)
    assert f'AutoModelForCausalLM.from_pretrained("org/m", revision="{"c" * 40}", config=config)' in text
