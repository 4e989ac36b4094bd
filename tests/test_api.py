"""forge in a notebook: `import forge` is light, trains, resumes, reads runs back, and leaves the process as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

import forge
import forge.errors
from forge.errors import ConfigError, UsageError

# Trains, stops, resumes and reads back in a process of its own, as a notebook would; prints what it saw as JSON.
NOTEBOOK = """
import json, logging, os, signal, sys
import forge, forge.errors
light = not {"torch", "transformers"} & set(sys.modules)
config, root = sys.argv[1:]
seen = {"light": light, "handler": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL}
run = forge.train(config, {"training.max_steps": 4, "training.seed": 5}, run_name="first", output_root=root)
seen |= {"steps": run.state.step, "complete": run.complete, "seed": run.config.training.seed, "name": run.name}
seen["model"] = (run.final / "model.safetensors").is_file()
seen["before"], seen["after"] = (run.evaluation(stage)["matched/accuracy"] for stage in ("baseline", "final"))
seen["reports"] = [row["step"] for row in run.metrics if "stage" not in row]

from forge.trainer.loop import LoopTrainer
train_step = LoopTrainer.train_step
def stopping(self, *args):
    train_step(self, *args)
    if self.state.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
LoopTrainer.train_step = stopping
try:
    forge.train(config, ["training.max_steps=5", "training.mixed_precision=bf16"], run_name="second", output_root=root)
except forge.errors.Stopped as stopped:
    seen["stopped"] = str(stopped)
LoopTrainer.train_step = train_step
half = forge.load_run("second", output_root=root)
seen |= {"half": [half.complete, half.state.step, half.state.latest_checkpoint]}
whole = forge.resume(half)
seen |= {"whole": [whole.complete, whole.state.step, whole.state.attempts]}
seen["again"] = forge.resume(whole.path).state.attempts
seen["handlers left"] = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
seen["root handlers"] = len(logging.getLogger().handlers)
print("SEEN" + json.dumps(seen))
"""


def test_a_notebook_trains_stops_resumes_and_reads_back(config_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", NOTEBOOK, str(config_file), str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    seen = json.loads(line.removeprefix("SEEN"))
    assert seen["light"]
    assert [seen[name] for name in ("steps", "complete", "seed", "name", "model")] == [4, True, 5, "first", True]
    assert seen["reports"] == [1, 2, 3, 4]
    assert seen["before"] != seen["after"]
    assert "stopped by SIGTERM in training at step" in seen["stopped"]
    step = seen["half"][1]
    assert seen["half"] == [False, step, f"checkpoint-{step}"]
    assert seen["whole"] == [True, 5, 2]
    assert seen["again"] == 2  # a complete run is left alone
    assert seen["handlers left"]
    assert seen["root handlers"] == 0


def test_settings_may_be_a_mapping_or_a_list(config_file: Path) -> None:
    by_name = forge.load_config(config_file, {"training.learning_rate": 1e-4, "training.max_grad_norm": None})
    by_text = forge.load_config(config_file, ["training.learning_rate=1e-4", "training.max_grad_norm=null"])
    assert by_name == by_text
    assert (by_name.training.learning_rate, by_name.training.max_grad_norm) == (1e-4, None)
    with pytest.raises(UsageError, match=r"training\.seed=1"):
        forge.load_config(config_file, "training.seed=1")
    with pytest.raises(ConfigError, match=r"training\.sede"):
        forge.load_config(config_file, {"training.sede": 1})


def test_several_ranks_are_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="forge launch"):
        forge.train(config_file)


def test_the_door_has_the_losses_and_no_other_names() -> None:
    assert forge.linear_kd.__module__ == "forge.losses.linear_kd"
    assert {"train", "resume", "Run", "logits_kd"} <= set(dir(forge))
    with pytest.raises(AttributeError, match="nothing"):
        _ = forge.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda config: forge.train(None), "config is None; give a path"),
        (lambda config: forge.train(config, 5), "settings is 5; give a list of texts"),
        (lambda config: forge.train(config, [5]), r"settings is \[5\]; give a list of texts"),
        (lambda config: forge.train(config, {"training.seed": object()}), "training.seed is a object"),
        (lambda config: forge.train(config, run_name=5), "run_name is 5; give a text"),
        (lambda config: forge.train(config, output_root=5), "output_root is 5; give a path"),
        (lambda config: forge.resume(None), "run is None; give a path"),
        (lambda config: forge.resume("x", allow_changes=5), "allow_changes is 5; give a list of keys"),
        (lambda config: forge.load_run(7), "run is 7; give a path"),
        (lambda config: forge.load_config(None), "file is None; give a path"),
    ],
)
def test_a_wrong_type_is_one_sentence(call: Any, sentence: str, config_file: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        call(config_file)


def test_settings_may_hold_paths_and_runs_stand_for_themselves(config_file: Path, tmp_path: Path) -> None:
    config = forge.load_config(config_file, {"output_root": tmp_path / "elsewhere"})
    assert config.output_root == str(tmp_path / "elsewhere")
