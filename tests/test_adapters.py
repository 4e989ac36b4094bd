"""Adapters as a model's source: the base is found and compared, and adapters are merged, trained on, and stacked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import LABELS, classifier, llama, logits, train, write_adapter, write_llama
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from forge.config.loader import load_config
from forge.config.schema import ModelConfig
from forge.errors import UsageError
from forge.model.adapter import adapter_tensors, is_adapted
from forge.model.classifier import load_classifier
from forge.model.load import LoadedModel, ReadWeights, processing_source, read_checkpoint
from forge.model.lora import with_lora
from forge.model.origin import WeightFiles, hash_of_files, hashed, weight_files
from forge.model.source import (
    ModelSource,
    load_model_config,
    load_tokenizer,
    model_source,
    origin_of,
    with_run_paths,
)
from forge.run.state import TrainingState, new_run_id


def read(**keys: Any) -> ReadWeights:
    source = model_source(ModelConfig(**keys), "model")
    config = load_model_config(source, "model.path")
    return read_checkpoint(AutoModelForCausalLM, source, config, "model", "weights")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of forge, on the base."""
    write_adapter(llama(base), base, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def expected(base: Path, adapter: Path) -> torch.Tensor:
    """What peft itself makes of the two."""
    return logits(PeftModel.from_pretrained(llama(base), adapter))


def as_run(adapter: Path, run: Path, inside: str = "final") -> Path:
    """A run that trained the adapter."""
    run.mkdir(parents=True, exist_ok=True)
    TrainingState(run_id=new_run_id()).save(run / "training_state.json")
    shutil.copytree(adapter, run / inside)
    return run


def test_an_adapter_is_merged_into_its_base_and_then_trained_in_full(adapter: Path, expected: torch.Tensor) -> None:
    model, missing, _ = read(path=str(adapter))
    torch.testing.assert_close(logits(model), expected)
    assert not is_adapted(model)
    assert missing == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters() if "lora" in name] == []


@pytest.mark.parametrize("inside", ["final", "checkpoint-8"])
def test_a_run_or_its_checkpoint_means_its_adapter(
    inside: str, adapter: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    run = as_run(adapter, tmp_path / "outputs" / "chat" / "first", inside)
    path = run if inside == "final" else run / inside
    torch.testing.assert_close(logits(read(path=str(path)).model), expected)


def test_a_run_is_found_by_its_name_unless_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "chat" / "first"
    run.mkdir(parents=True)
    TrainingState(run_id=new_run_id()).save(run / "training_state.json")
    Path("c.yaml").write_text(
        "task: {type: classification, dataset: {path: d}}\nmodel: {path: first, adapter: other, tokenizer: org/first}\n"
    )
    config = load_config(Path("c.yaml")).config
    named = with_run_paths(config).model
    assert (named.path, named.adapter, named.tokenizer) == (str(run), "other", "org/first")

    Path("first").mkdir()
    assert with_run_paths(config).model.path == "first"
    Path("first").rmdir()
    second = tmp_path / "outputs" / "ocr" / "first"
    second.mkdir(parents=True)
    TrainingState(run_id=new_run_id()).save(second / "training_state.json")
    with pytest.raises(UsageError, match="2 runs in outputs are named first; give the path of one"):
        with_run_paths(config)


def test_an_adapter_is_applied_to_the_model_of_path(base: Path, adapter: Path, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits(read(path=str(base), adapter=str(adapter)).model), expected)


def test_a_foreign_adapter_names_its_base_in_its_config(
    base: Path, adapter: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    (adapter / "base.json").unlink()
    source = model_source(ModelConfig(path=str(adapter)), "model")
    assert (source.location, source.name, source.base) == (str(base), str(adapter), str(base))
    torch.testing.assert_close(logits(read(path=str(adapter)).model), expected)

    base.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"if it is elsewhere, set model.base"):
        model_source(ModelConfig(path=str(adapter)), "model")
    moved = read(path=str(adapter), base=str(tmp_path / "moved")).model
    torch.testing.assert_close(logits(moved), expected)

    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UsageError, match=r"model.path: .*model.base"):
        model_source(ModelConfig(path=str(adapter)), "model")


def test_a_base_that_is_gone_is_named_with_the_key_that_replaces_it(
    base: Path, adapter: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    base.rename(tmp_path / "moved")
    with pytest.raises(UsageError) as error:
        model_source(ModelConfig(path=str(adapter)), "model")
    assert f"the base of {adapter} is no longer at {base};" in str(error.value)
    assert "model.base" in str(error.value)
    moved = read(path=str(adapter), base=str(tmp_path / "moved")).model
    torch.testing.assert_close(logits(moved), expected)


def test_a_base_whose_weights_have_changed_is_refused_unless_it_is_asked_for(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = model_source(ModelConfig(path=str(adapter)), "model")
    then = origin_of(source, "model").base.sha256
    write_llama(base, seed=5)
    now = hashed(WeightFiles(name="b", location=str(base))).sha256
    assert then != now
    with pytest.raises(UsageError) as error:
        origin_of(source, "model")
    assert f"was trained on {base} with the weights {then[:12]}, but {base} has {now[:12]}" in str(error.value)
    with pytest.raises(UsageError, match=then[:12]):
        origin_of(model_source(ModelConfig(path=str(base), adapter=str(adapter)), "model"), "model")
    assert not caplog.records

    asked = origin_of(model_source(ModelConfig(path=str(adapter), base=str(base)), "model"), "model")
    assert asked.base.sha256 == now
    assert [record.message for record in caplog.records if "model.base is set" in record.message]


@pytest.mark.parametrize("by", ["path", "adapter"])
def test_a_stacked_adapter_comes_with_the_adapters_it_was_trained_on(
    by: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """One is merged into the base, a second trained on that: the second alone would be another model."""
    top = tmp_path / "top"
    merged = read(path=str(adapter)).model
    expected = write_adapter(merged, base, top, below=(adapter,), seed=2, target_modules=["v_proj"])

    keys = {"path": str(top)} if by == "path" else {"path": str(base), "adapter": str(top)}
    source = model_source(ModelConfig(**keys), "model")
    assert [part.location for part in source.adapters] == [str(adapter), str(top)]
    torch.testing.assert_close(logits(read(**keys).model), expected)
    # path is the first adapter already: it is not applied twice
    torch.testing.assert_close(logits(read(path=str(adapter), adapter=str(top)).model), expected)

    origin = origin_of(source, "model")
    assert origin.base.sha256 == hash_of_files(weight_files(base))
    assert [part.sha256 for part in origin.adapters] == [hash_of_files(weight_files(path)) for path in (adapter, top)]
    save_file(load_file(top / "adapter_model.safetensors"), adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=f"was trained on {adapter} with the weights {origin.adapters[0].sha256[:12]}"):
        origin_of(source, "model")


@pytest.fixture
def stack(base: Path, adapter: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter on `adapter` on `base`, and what that model says."""
    top = tmp_path / "top"
    expected = write_adapter(
        read(path=str(adapter)).model, base, top, below=(adapter,), seed=2, target_modules=["v_proj"]
    )
    return top, expected


@pytest.mark.parametrize("how", ["a copy", "a link", "another spelling", "a copy as the base"])
def test_an_earlier_adapter_is_applied_once_wherever_it_is(
    how: str, base: Path, adapter: Path, stack: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    top, expected = stack
    below = tmp_path / "below"
    if how == "a link":
        below.symlink_to(adapter)
    elif how == "another spelling":
        below = base / ".." / adapter.name
    else:
        shutil.copytree(adapter, below)
    keys = {"path": str(top), "base": str(below)} if "base" in how else {"path": str(below), "adapter": str(top)}
    assert len(origin_of(model_source(ModelConfig(**keys), "model"), "model").adapters) == 2
    torch.testing.assert_close(logits(read(**keys).model), expected)


@pytest.mark.parametrize("stranger", [False, True])
@pytest.mark.parametrize("second", ["adapter", "base"])
def test_an_adapter_on_itself_is_refused(second: str, stranger: bool, adapter: Path) -> None:
    if stranger:
        (adapter / "base.json").unlink()
    source = model_source(ModelConfig(**{"path": str(adapter), second: str(adapter)}), "model")
    with pytest.raises(UsageError, match=f"the adapter {adapter} would be applied twice"):
        origin_of(source, "model")


def test_more_or_fewer_adapters_than_it_was_trained_on_are_refused(
    base: Path, adapter: Path, stack: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    top, _ = stack
    write_adapter(llama(base), base, tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match=r"trained on .*base with 0 adapters, not 2"):
        origin_of(model_source(ModelConfig(path=str(top), adapter=str(tmp_path / "other")), "model"), "model")


def test_model_base_replaces_everything_under_the_adapter(
    base: Path, adapter: Path, stack: tuple[Path, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if the earlier adapter is gone: its copy, or base and adapter merged into one model."""
    top, expected = stack
    read(path=str(adapter)).model.save_pretrained(tmp_path / "merged")
    shutil.move(adapter, tmp_path / "moved")
    with pytest.raises(UsageError) as error:
        model_source(ModelConfig(path=str(top)), "model")
    assert str(top) in str(error.value)
    assert f"no longer at {adapter};" in str(error.value)
    assert "set model.path to the adapter and model.base" in str(error.value)
    for place in ("merged", "moved"):
        caplog.clear()
        keys = {"path": str(top), "base": str(tmp_path / place)}
        torch.testing.assert_close(logits(read(**keys).model), expected)
        origin_of(model_source(ModelConfig(**keys), "model"), "model")
        assert ("model.base is set" in caplog.text) == (place == "merged")
    # The merged model is not what it was trained on, and the earlier adapter would be applied to it again.
    with pytest.raises(UsageError, match=r"model.path to the adapter and model.base"):
        model_source(ModelConfig(path=str(tmp_path / "merged"), adapter=str(top)), "model")
    shutil.copytree(tmp_path / "moved", adapter)
    again = model_source(ModelConfig(path=str(tmp_path / "merged"), adapter=str(top)), "model")
    with pytest.raises(UsageError, match=r"model.path to the adapter and model.base"):
        origin_of(again, "model")


def test_model_base_and_model_adapter_exclude_each_other(base: Path, adapter: Path) -> None:
    keys = {"path": str(base), "adapter": str(adapter), "base": str(base)}
    with pytest.raises(UsageError, match=r"model.base is .*model.adapter.*remove model.base"):
        model_source(ModelConfig(**keys), "model")


def test_an_adapter_whose_head_is_missing_cannot_be_continued(tiny_model: Path, tmp_path: Path) -> None:
    """The head would be made by chance, be frozen, and be in no file."""
    folder = tmp_path / "adapter"
    write_adapter(classifier(tiny_model), tiny_model, folder, target_modules=["query"])
    (folder / "base_config.json").unlink()
    config = ModelConfig(path=str(folder), continue_adapter=True)
    loaded = load_classifier(config, LABELS, load_tokenizer(*processing_source(config)))
    with pytest.raises(UsageError, match=r"neither the adapter \S+ nor its base has classifier.bias .*model.lora"):
        with_lora(loaded, config, seed=1)
    new = ModelConfig(path=str(folder), lora={"rank": 1, "target": ["value"]})
    fresh = with_lora(load_classifier(new, LABELS, load_tokenizer(*processing_source(new))), new, seed=1)
    assert fresh.adapter.trained_in_full == ["classifier"]


@pytest.mark.parametrize("broken", ["base", "adapter"])
def test_truncated_weights_are_refused(broken: str, base: Path, adapter: Path) -> None:
    file = base / "model.safetensors" if broken == "base" else adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"^model.path"):
        read(path=str(adapter))


@pytest.mark.parametrize(
    "changed", [{"name": 5}, {"location": None}, {"revision": 1}, {"sha256": ["a"]}, {"strange": "x"}]
)
def test_base_json_with_wrong_values_is_refused(changed: dict, adapter: Path) -> None:
    record = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps({**record, "base": {**record["base"], **changed}}))
    with pytest.raises(UsageError, match=r"base.json .*base.(name|location|revision|sha256|strange).* model.base"):
        model_source(ModelConfig(path=str(adapter)), "model")


@pytest.mark.parametrize("file", ["base.json", "adapter_config.json"])
def test_a_broken_file_of_an_adapter_is_named(file: str, adapter: Path) -> None:
    (adapter / file).write_text('{"half": ')
    with pytest.raises(UsageError) as error:
        read(path=str(adapter))
    assert str(error.value) == f"{adapter / file} is broken; restore it, or name another adapter or model"


def test_an_adapter_without_weights_names_the_file_that_is_missing(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"the adapter in \S+ has no weights; put adapter_model.safetensors back"):
        read(path=str(adapter))


def test_parts_come_from_the_newest_adapter_that_has_them(tmp_path: Path) -> None:
    old, new, bare = (tmp_path / name for name in ("old", "new", "bare"))
    for folder in (old, new, bare):
        folder.mkdir()
    (old / "tokenizer.json").touch()
    (old / "config.json").touch()
    (new / "base_config.json").touch()
    adapters = tuple(WeightFiles(name=folder.name, location=str(folder)) for folder in (old, new, bare))
    source = ModelSource("m", str(tmp_path), adapters=adapters)
    assert source.place_of("config.json").location == str(new)
    assert source.place_of("tokenizer").location == str(old)
    assert source.place_of("processor") is source


def test_a_hub_base_is_read_at_the_commit_that_is_recorded(adapter: Path) -> None:
    record = json.loads((adapter / "base.json").read_text())
    base = {"name": "org/m", "location": "org/m", "revision": "main", "commit": "c" * 40, "sha256": None}
    (adapter / "base.json").write_text(json.dumps({**record, "base": base}))
    source = model_source(ModelConfig(path=str(adapter)), "model")
    assert (source.location, source.revision) == ("org/m", "c" * 40)


def test_an_adapter_is_trained_further(adapter: Path, expected: torch.Tensor) -> None:
    config = ModelConfig(path=str(adapter), continue_adapter=True)
    model, missing, _ = read(path=str(adapter), continue_adapter=True)
    assert (is_adapted(model), missing) == (True, [])
    torch.testing.assert_close(logits(model), expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all(".lora_" in name for name in trained)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter_tensors(model).items())
    named = ModelConfig(path=str(adapter), adapter="the one on it", continue_adapter=True)
    facts = with_lora(LoadedModel(model, None, [], []), named, seed=1).adapter
    assert facts is not None
    assert facts.continues == "the one on it"
    source = model_source(config, "model")
    assert origin_of(source, "model").without_last().weights_sha256 == hash_of_files(
        weight_files(Path(source.location))
    )


def test_only_an_adapter_can_be_continued_or_have_a_base(base: Path, adapter: Path) -> None:
    with pytest.raises(UsageError, match=r"model.continue_adapter is true, but .* not an adapter"):
        model_source(ModelConfig(path=str(base), continue_adapter=True), "model")
    with pytest.raises(UsageError, match=r"model.base is .*not an adapter; remove model.base"):
        model_source(ModelConfig(path=str(base), base=str(base)), "model")
    with pytest.raises(UsageError, match=r"has no adapter_config.json; name a LoRA adapter"):
        model_source(ModelConfig(path=str(base), adapter=str(base)), "model")


def test_an_adapter_for_another_architecture_is_refused(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    other_shape = write_llama(tmp_path / "three", layers=3)
    with pytest.raises(UsageError) as error:
        read(path=str(other_shape), adapter=str(adapter))
    assert "does not fit LlamaForCausalLM" in str(error.value)
    assert "the adapter has no model.layers.2.self_attn.q_proj.lora_A.weight, 2 in all" in str(error.value)

    fewer = write_llama(tmp_path / "one", layers=1)
    with pytest.raises(UsageError, match=r"the model has no model.layers.1.self_attn.q_proj.lora_\S+ 2 in all"):
        read(path=str(fewer), adapter=str(adapter))

    source = model_source(ModelConfig(path=str(tiny_model), adapter=str(adapter)), "model")
    with pytest.raises(UsageError, match=r"trained on a llama model, .* a bert"):
        load_model_config(source, "model.path")
    (adapter / "base_config.json").unlink()
    bare = model_source(ModelConfig(path=str(tiny_model), adapter=str(adapter)), "model")
    with pytest.raises(UsageError, match=r"does not fit Bert.*set model.base"):
        read_checkpoint(AutoModelForCausalLM, bare, load_model_config(bare, "model.path"), "model", "weights")


def test_a_wider_adapter_names_the_first_shape_that_differs(base: Path, adapter: Path) -> None:
    saved = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**saved, name: torch.zeros(2, 24)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"\(size mismatch for model.layers.0.self_attn.q_proj.lora_A.default.weight"):
        read(path=str(adapter))


def test_other_kinds_of_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    strange = get_peft_model(
        llama(base), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    strange.save_pretrained(tmp_path / "ia3")
    with pytest.raises(UsageError, match=r"model.path: .* is a IA3 adapter"):
        read(path=str(tmp_path / "ia3"))


def test_a_classifier_has_the_head_and_the_labels_of_its_adapter(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The base has neither: the head is in the adapter, and the names are in the config next to it."""
    folder = tmp_path / "adapter"
    expected = write_adapter(
        classifier(tiny_model), tiny_model, folder, target_modules=["query"], modules_to_save=["classifier"]
    )
    config = ModelConfig(path=str(folder))
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(*processing_source(config))
    assert len(tokenizer) == 20  # the base's: the adapter's folder has none
    loaded = load_classifier(config, [LABELS[2], LABELS[0], LABELS[1]], tokenizer)
    assert loaded.new_weights == []
    assert loaded.label_ids == [2, 0, 1]
    torch.testing.assert_close(logits(loaded.model), expected)
    assert not any("initialised" in record.message for record in caplog.records)

    # A new adapter on top trains no head: it is not new any more.
    top = with_lora(loaded, ModelConfig(path=str(folder), lora={"rank": 1, "target": ["value"]}), seed=1)
    assert top.adapter is not None
    assert top.adapter.trained_in_full == []
    train(top.model)
    assert not torch.equal(logits(top.model), expected)


def test_the_adapters_tokenizer_is_preferred_to_the_bases(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_adapter(classifier(tiny_model), tiny_model, folder, target_modules=["query"])
    tokenizer = load_tokenizer(model_source(ModelConfig(path=str(tiny_model)), "model"), "model.path")
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(model_source(ModelConfig(path=str(folder)), "model"), "model.path")) == len(tokenizer)


def test_the_hash_is_of_the_files_that_are_read_and_the_hubs_cache_knows_it(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m")
    (alone,) = weight_files(folder)
    assert alone.name == "model.safetensors"
    (folder / "pytorch_model.bin").write_bytes(b"older")
    assert weight_files(folder) == [alone]
    first = hash_of_files([alone])

    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"never read")
    alone.unlink()
    alone.symlink_to(blob)
    assert hash_of_files([alone]) != first
    blob.write_bytes(b"other bytes under the same name")
    assert hash_of_files([alone]) == hash_of_files([alone])

    (folder / "adapter_model.safetensors").write_bytes(b"a stray file")
    assert weight_files(folder) == [alone]  # nothing in the folder says that it is an adapter

    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    names_in_order = hash_of_files([one, two])
    one.write_bytes(b"2")
    two.write_bytes(b"1")
    assert hash_of_files([one, two]) != names_in_order  # the same bytes under each other's names

    llama(write_llama(tmp_path / "n")).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    shards = weight_files(tmp_path / "shards")
    assert len(shards) > 1
    assert all(file.name.startswith("model-0") for file in shards)


def test_peft_adapters_in_the_old_format_are_read(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(llama(base), LoraConfig(r=2, target_modules=["q_proj"]))
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").is_file()
    torch.testing.assert_close(logits(read(path=str(tmp_path / "old")).model), expected)
