"""The export: of an adapter, of a merged model that computes the same, of other dtypes, in shards, and to the hub."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import IDS, classifier, llama, logits, write_adapter, write_llama
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import forge.model.export as exports
from forge.errors import TrainingError
from forge.model.export import Merge, export_merged, export_model, push_to_hub
from forge.model.origin import Origin, Weights, hashed


def merged(base: Path, adapter: Path, dtype: str = "float32", *below: Path, auto: Any = AutoModelForCausalLM) -> Merge:
    origin = Origin(hashed(Weights("base", str(base))), tuple(Weights(path.name, str(path)) for path in below))
    trained = auto.from_config(AutoConfig.from_pretrained(adapter))
    return export_merged(adapter, origin, auto, trained, dtype, {"input_ids": IDS})


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
    expected = write_adapter(llama(base), base, tmp_path / "adapter", **KINDS[kind])
    assert (expected - logits(llama(base))).abs().max() > 0.1  # the adapter does something
    found = merged(base, tmp_path / "adapter")
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
    expected = write_adapter(classifier(tiny_model), tiny_model, tmp_path / "adapter", **settings)
    merged(tiny_model, tmp_path / "adapter", auto=AutoModelForSequenceClassification)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter" / "merged")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert loaded.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


def test_stacked_adapters_are_merged_one_after_the_other(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    write_adapter(llama(base), base, tmp_path / "first")
    merged(base, tmp_path / "first")
    between = llama(tmp_path / "first" / "merged")
    expected = write_adapter(between, base, tmp_path / "second", below=(tmp_path / "first",), seed=2)
    merged(base, tmp_path / "second", "float32", tmp_path / "first")
    torch.testing.assert_close(logits(llama(tmp_path / "second" / "merged")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_a_merged_model_takes_its_dtype_and_the_rounding_is_measured(dtype: str, stored: str, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", tied=True)
    expected = write_adapter(llama(base), base, tmp_path / "adapter")
    found = merged(base, tmp_path / "adapter", dtype)
    folder = tmp_path / "adapter" / "merged"
    assert dtypes_in(folder) == {stored}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    difference = (logits(llama(folder)) - expected).abs().max().item()
    assert found.largest_difference == pytest.approx(difference, rel=1e-3)
    assert found.before_rounding < 1e-4 < found.largest_difference < 0.1 * found.largest_logit


def test_a_merge_that_loses_weights_is_an_error_and_not_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_llama(tmp_path / "base", tied=True)
    write_adapter(llama(base), base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with monkeypatch.context() as patch:  # as peft merges alone: into the weight that the embeddings share
        patch.setattr("forge.model.adapter.untie", lambda model: None)
        with pytest.raises(TrainingError, match=r"merging the adapter changed the logits by .*export.merge=false"):
            merged(base, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "merged").exists()

    def forgets(model: PreTrainedModel, folder: Path, dtype: str) -> None:
        model.model.layers[1].mlp.up_proj.weight.data.mul_(0.9)
        export_model(model, folder, dtype)

    monkeypatch.setattr(exports, "export_model", forgets)
    with pytest.raises(TrainingError, match="writing the merged model to merged changed the logits"):
        merged(base, tmp_path / "adapter")


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_are_exported_in_the_dtype_asked_for(tied: bool, tmp_path: Path) -> None:
    model = llama(write_llama(tmp_path / "base", tied=tied))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tmp_path / "half", "bfloat16")
    assert dtypes_in(tmp_path / "half") == {"BF16"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")  # in the dtype that its config tells
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

    def __init__(self, error: Exception | None = None):
        self.error, self.calls = error, []

    def create_repo(self, name: str, **settings: Any) -> Any:
        self.calls.append(("create_repo", name, settings))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, **settings: Any) -> None:
        self.calls.append(("upload_folder", settings["repo_id"], settings["folder_path"]))


def test_an_upload_makes_a_private_repository(tmp_path: Path) -> None:
    hub = FakeHub()
    assert push_to_hub(tmp_path, "model", hub)
    assert hub.calls == [
        ("create_repo", "model", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/model", tmp_path),
    ]


def test_an_upload_that_fails_is_told_of_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert not push_to_hub(tmp_path, "me/model", FakeHub(ConnectionError("no route\nto the hub")))
    told = "\n".join(record.message for record in caplog.records)
    assert "could not be uploaded to me/model (ConnectionError: no route to the hub)" in told
    assert f"hf upload me/model {tmp_path}" in told
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
