"""Whatever a library raises while it reads a part of a model is one sentence that says which part of which model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

import forge
from forge.cli.main import main
from forge.config.schema import ModelConfig
from forge.errors import Stopped, UsageError
from forge.model.adapter import read_adapter
from forge.model.source import ModelSource, find_model, load_model_config, load_tokenizer, reading


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoiled."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantized_weights_are_refused_by_their_config(method: str, model: Path) -> None:
    change(model / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(
        UsageError, match=rf"has quantized weights \({method}\), which forge neither.*set teacher\.path"
    ):
        load_model_config(find_model(str(model), "teacher.path"), "teacher.path")


def test_a_tokenizer_of_a_newer_library_is_not_a_bug(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": {"type": "FromTheFuture"}}))
    with pytest.raises(UsageError, match=r"model\.path: the folder .*model has no usable tokenizer \("):
        load_tokenizer(find_model(str(model), "model.path"), "model.path")


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run_and_nothing_is_asked(
    part: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a library has asked a question"))
    (model / "own.py").write_text("raise SystemExit('run')\n")
    if part == "config":
        change(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
        load: Any = load_model_config
    else:
        change(model / "config.json", model_type="own")
        change(model / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
        load = load_tokenizer
    with pytest.raises(UsageError) as caught:
        load(find_model(str(model), "model.path"), "model.path")
    assert "needs Python code that comes with the model" in str(caught.value)
    assert transformers.__version__ in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("odd"), IndexError(), StopIteration(), ImportError("gptqmodel")])
def test_any_exception_becomes_a_sentence_with_its_cause(error: Exception) -> None:
    with (
        pytest.raises(UsageError, match=r"teacher\.path") as caught,
        reading(ModelSource("m", "/"), "teacher.path", "weights"),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert (str(error) or type(error).__name__) in str(caught.value)


def test_what_forge_itself_raises_passes() -> None:
    with pytest.raises(Stopped), reading(ModelSource("m", "/"), "model.path", "weights"):
        raise Stopped("stopped by SIGTERM")


def test_an_adapter_that_is_no_tensors_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["query"]})
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that would run a command
    with pytest.raises(UsageError, match="cannot be read"):
        read_adapter(tmp_path, "model.path")


def test_a_name_that_no_file_can_have_is_not_a_folder(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tmp_path / ("x" * 300)))
    assert config.path is not None
    with pytest.raises(UsageError, match="is not a folder here"):
        find_model(config.path, "model.path")


def test_what_a_library_raised_is_in_the_log_of_the_run(
    config_file: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"model.path": model, "training.max_steps": 2}
    run = forge.train(config_file, settings, run_name="r", output_root=tmp_path / "runs")
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "FromTheFuture"}}')
    assert main(["train", "--resume", str(run.path), "--max_steps", "4"]) == 2
    shown, kept = capfd.readouterr().err, (run.path / "output.log").read_text()
    assert "has no usable tokenizer" in shown
    assert "Traceback" not in shown
    assert "has no usable tokenizer" in kept
    assert "Traceback" in kept
    assert forge.load_run(run.path).complete  # nothing of it has changed
