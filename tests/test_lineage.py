"""Runs that start from runs, through the true command: a model, an adapter on it, one on that, and their records."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import classifier, logits
from conftest import forge
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from forge.config.loader import load_config
from forge.model.origin import Origin, WeightFiles, hash_of_files, lineage, weight_files
from forge.run.files import read_json
from forge.run.state import TrainingState

QUICK = ("training.max_steps=2", "checkpoint.every_steps=1", "evaluation.baseline=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data_folder: Path) -> SimpleNamespace:
    """`full`, `adapter` on it, `stacked` on that, `on` which trains the adapter on, and `whole` on the stack."""
    folder = tmp_path_factory.mktemp("chain")
    config = folder / "configs" / "nli" / "tiny.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"""
task:
  type: classification
  dataset: {{path: {data_folder}}}
  columns: {{text: premise, text_pair: hypothesis}}
  labels: [entailment, neutral, contradiction]
  max_length: 32
model: {{path: {tiny_model}, dropout: 0.0}}
training: {{batch_size: 8, learning_rate: 3e-2, mixed_precision: no}}
output_root: {folder / "outputs"}
""")

    def run(name: str, *settings: str) -> Path:
        words = [word for setting in (*QUICK, *settings) for word in ("--set", setting)]
        done = forge("--config", config, "--run_name", name, *words)
        assert done.returncode == 0, done.stderr
        return folder / "outputs" / "nli" / "tiny" / name

    return SimpleNamespace(
        config=config,
        outputs=folder / "outputs",
        full=run("full"),
        adapter=run("adapter", "model.path=full", "model.lora.rank=2", "export.merge=true", "export.dtype=bfloat16"),
        stacked=run("stacked", "model.path=adapter", "model.lora.rank=3", "export.merge=true"),
        on=run("on", "model.path=adapter", "model.continue_adapter=true"),
        whole=run("whole", "model.path=stacked"),
    )


def metadata(run: Path) -> dict:
    return read_json(run / "run_metadata.json")


def model_of(folder: Path) -> AutoModelForSequenceClassification:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def test_a_run_records_its_ancestors_the_oldest_first(runs: SimpleNamespace) -> None:
    assert metadata(runs.full)["lineage"] == []
    (parent,) = metadata(runs.adapter)["lineage"]
    assert parent == {
        "role": "model",
        "run_id": metadata(runs.full)["run_id"],
        "name": "full",
        "path": str(runs.full),
        "config": "nli/tiny",
        "weights_sha256": hash_of_files(weight_files(runs.full / "final")),
        "steps": 2,
    }
    line = metadata(runs.whole)["lineage"]
    assert [(run["role"], run["name"]) for run in line] == [
        ("base", "full"),
        ("adapter", "adapter"),
        ("adapter", "stacked"),
    ]
    assert line[2]["weights_sha256"] == hash_of_files(weight_files(runs.stacked / "final"))


def test_every_run_records_the_hash_of_what_it_started_from(runs: SimpleNamespace, tiny_model: Path) -> None:
    assert metadata(runs.full)["model"]["weights_sha256"] == hash_of_files(weight_files(tiny_model))
    base = hash_of_files(weight_files(runs.full / "final"))
    model = metadata(runs.adapter)["model"]
    assert (model["weights_sha256"], model["base_sha256"]) == (base, base)
    stacked, continued = (metadata(run)["model"] for run in (runs.stacked, runs.on))
    assert stacked["weights_sha256"] == continued["weights_sha256"] != base  # both start from base and adapter
    assert stacked["base_sha256"] == stacked["weights_sha256"]
    assert continued["base_sha256"] == base  # the continued adapter is applied to the base alone
    assert model["trained_parameters"] < model["parameters"] / 4
    assert metadata(runs.whole)["model"]["adapter"] is None


def test_final_is_the_adapter_and_peft_loads_it(runs: SimpleNamespace) -> None:
    final = runs.adapter / "final"
    assert {path.name for path in final.iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "base.json", "base_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "README.md", "merged"),
    }
    base = AutoModelForSequenceClassification.from_pretrained(
        runs.full / "final", config=AutoConfig.from_pretrained(final / "base_config.json")
    )
    expected = logits(PeftModel.from_pretrained(base, final))
    # With a config.json next to the adapter it would look for whole weights there.
    alone = AutoModelForSequenceClassification.from_pretrained(final)
    torch.testing.assert_close(logits(alone), expected, rtol=0, atol=1e-5)
    largest = (logits(model_of(final / "merged")) - expected).abs().max().item()
    assert metadata(runs.adapter)["merged"]["largest_difference"] == pytest.approx(largest, abs=0.02)
    assert metadata(runs.adapter)["merged"]["dtype"] == "bfloat16"
    assert 0 < largest < 0.1 * expected.abs().max()


def test_the_stack_is_what_the_next_run_starts_from(runs: SimpleNamespace) -> None:
    record = json.loads((runs.stacked / "final" / "base.json").read_text())
    assert record["base"]["location"] == str(runs.full / "final")
    assert [part["location"] for part in record["adapters"]] == [str(runs.adapter / "final")]
    base = model_of(runs.full / "final")
    first = PeftModel.from_pretrained(base, runs.adapter / "final").merge_and_unload()
    expected = logits(PeftModel.from_pretrained(first, runs.stacked / "final"))
    torch.testing.assert_close(logits(model_of(runs.stacked / "final" / "merged")), expected, rtol=1e-4, atol=1e-4)


def test_a_continued_adapter_is_one_adapter_on_the_same_base(runs: SimpleNamespace) -> None:
    names = ("adapter_config.json", "base.json")
    one, other = ([json.loads((run / "final" / name).read_text()) for name in names] for run in (runs.adapter, runs.on))
    assert one == other
    weights = [(run / "final" / "adapter_model.safetensors").read_bytes() for run in (runs.adapter, runs.on)]
    assert weights[0] != weights[1]
    assert metadata(runs.on)["model"]["adapter"]["continues"] == str(runs.adapter)


def test_the_card_names_the_base_the_lineage_and_how_to_load(runs: SimpleNamespace, tiny_model: Path) -> None:
    card = (runs.stacked / "final" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "- LoRA adapter of rank 3 (alpha 32): " in card
    own = hash_of_files(weight_files(runs.full / "final"))[
        :12
    ]  # of the base, not of everything that the adapter was trained on
    assert f"- Base: {runs.full / 'final'}, weights `{own}` (base.json has the full hash)" in card
    assert f"1. full (nli/tiny, run `{metadata(runs.full)['run_id']}`): 2 steps, as base" in card
    assert "2. adapter (nli/tiny, run `" in card
    assert "Or without peft" in card
    code = (
        card.partition("```python\n")[2].partition("```")[0].replace("PATH OF THIS FOLDER", str(runs.stacked / "final"))
    )
    scope: dict = {}
    exec(code, scope)  # what the card shows its readers
    expected = logits(model_of(runs.stacked / "final" / "merged"))
    torch.testing.assert_close(logits(scope["model"]), expected, rtol=1e-4, atol=1e-4)
    assert "library_name: transformers" in (runs.whole / "final" / "README.md").read_text()


def test_a_resumed_adapter_finds_its_base_changed(runs: SimpleNamespace, tmp_path: Path) -> None:
    """A run that is not complete, whose base was trained again meanwhile."""
    outputs = tmp_path / "outputs"
    base = tmp_path / "base"
    shutil.copytree(runs.full / "final", base)
    words = [word for setting in QUICK for word in ("--set", setting)]
    words += ["--set", f"model.path={base}", "--set", "model.lora.rank=2", "--output_root", str(outputs)]
    stopped = forge("--config", runs.config, "--run_name", "r", *words)
    assert stopped.returncode == 0, stopped.stderr
    run = outputs / "nli" / "tiny" / "r"
    state = read_json(run / "training_state.json")
    (run / "training_state.json").write_text(json.dumps({**state, "pipeline_complete": False, "stage": "training"}))
    classifier(base).save_pretrained(base)  # the same bytes in the same file: nothing has changed
    again = hash_of_files(weight_files(base))
    assert again == read_json(run / "checkpoint-2" / "manifest.json")["base"]

    model = classifier(base)
    model.classifier.weight.data.add_(1)
    model.save_pretrained(base)
    refused = forge("--resume", run)
    assert refused.returncode == 2
    assert hash_of_files(weight_files(base))[:12] in refused.stderr
    assert f"was trained on {again[:12]}" in refused.stderr


def test_a_run_without_a_checkpoint_finds_its_base_changed(runs: SimpleNamespace, tmp_path: Path) -> None:
    """It would start again, from other weights than its metadata records."""
    base = tmp_path / "base"
    shutil.copytree(runs.full / "final", base)
    words = [word for setting in QUICK for word in ("--set", setting)]
    words += ["--set", f"model.path={base}", "--set", "model.lora.rank=2", "--output_root", str(tmp_path / "outputs")]
    done = forge("--config", runs.config, "--run_name", "r", *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "outputs" / "nli" / "tiny" / "r"
    state = read_json(run / "training_state.json")
    fresh = TrainingState(run_id=state["run_id"], attempts=1)
    fresh.save(run / "training_state.json")
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (run / "latest_checkpoint").unlink()
    then = hash_of_files(weight_files(base))

    model = classifier(base)
    model.classifier.weight.data.add_(1)
    model.save_pretrained(base)
    refused = forge("--resume", run)
    assert refused.returncode == 2
    now = hash_of_files(weight_files(base))
    assert now[:12] in refused.stderr
    assert then[:12] in refused.stderr


def test_a_run_is_never_its_own_model(runs: SimpleNamespace, tmp_path: Path) -> None:
    """A name that was a model's when the run began stays that, although the run has it by now; and a second export
    does not mention the merge of the first."""
    run = tmp_path / "outputs" / "nli" / "tiny" / "adapter"
    shutil.copytree(runs.adapter, run)
    state = read_json(run / "training_state.json")
    (run / "training_state.json").write_text(json.dumps({**state, "pipeline_complete": False, "stage": "export"}))
    settings = ("--set", "export.merge=false", "--output_root", str(tmp_path / "outputs"))
    assert "merged" in metadata(run)
    done = forge("--resume", run, *settings)
    assert done.returncode == 0, done.stderr
    assert "merged" not in metadata(run)
    assert "Or without peft" not in (run / "final" / "README.md").read_text()

    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"path: {runs.full}", "path: adapter"))
    (run / "training_state.json").write_text(json.dumps({**state, "pipeline_complete": False, "stage": "export"}))
    refused = forge("--resume", run, *settings, "--allow-change", "model.path")
    assert refused.returncode == 2
    assert "adapter is the run" not in refused.stderr
    assert "model.path: looking for adapter in the local cache and on the hub" in refused.stderr


def test_nothing_leaves_the_machine_in_debug(runs: SimpleNamespace) -> None:
    settings = ["export.push_to_hub=me/model"]
    assert load_config(runs.config, settings).config.export.push_to_hub == "me/model"
    assert load_config(runs.config, settings, debug=True).config.export.push_to_hub is None


def test_a_folder_that_no_run_made_has_no_lineage(
    tiny_model: Path, runs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.full)  # a hub id is not a folder, wherever forge is started
    assert lineage(None) == []
    assert lineage(Origin(WeightFiles(name="m", location=str(tiny_model)))) == []
    assert lineage(Origin(WeightFiles(name="org/name", location="org/name"))) == []


def test_a_checkpoint_counts_its_own_steps(runs: SimpleNamespace) -> None:
    folder = runs.full / "checkpoint-1"
    (own,) = lineage(Origin(WeightFiles(name="c", location=str(folder), sha256="ab")), role="teacher")
    assert (own.role, own.steps, own.weights_sha256) == ("teacher", 1, "ab")
    (own,) = lineage(Origin(WeightFiles(name="m", location=str(runs.full / "final" / "merged"))))
    assert own.steps == 2
