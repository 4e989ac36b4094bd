"""The whole job through the true command: a run directory from baseline to model card, on one rank and on two."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
import yaml
from conftest import REPOSITORY, forge, forge_on_two_ranks, pair_rows, write_rows

from forge.run.files import read_json, read_json_lines


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def only_run(root: Path) -> Path:
    (state,) = root.glob("*/*/training_state.json")
    return state.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data_folder: Path) -> tuple[Path, str, str]:
    """One finished run with its output: (directory, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.yaml"
    config.write_text(f"""
task:
  type: classification
  dataset: {{path: {data_folder}}}
  columns: {{text: premise, text_pair: hypothesis}}
  labels: [entailment, neutral, contradiction]
  max_length: 12
model: {{path: {tiny_model}}}
training: {{max_steps: 4, batch_size: 8, mixed_precision: no}}
logging: {{every_steps: 2}}
tracking: {{wandb: {{project: test, mode: offline}}}}
output_root: {folder / "outputs"}
""")
    done = forge("--config", config, "--run_name", "first", **{warm.PREDICTS_MEMORY: "1"})
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "tiny" / "first", done.stdout, done.stderr


def test_a_finished_run_directory_holds_what_the_house_says(finished: tuple[Path, str, str]) -> None:
    run, _, _ = finished

    assert {path.name for path in run.iterdir()} >= {
        *("config.yaml", "run_metadata.json", "training_state.json", "output.log", "metrics.jsonl"),
        *("requirements.txt", "checkpoint-4", "latest_checkpoint", "final"),
    }
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    assert list((run.parents[1] / ".incomplete").iterdir()) == []
    modes = {
        path.name: path.stat().st_mode & 0o777
        for folder in ("final", "checkpoint-4")
        for path in (run / folder).iterdir()
    }
    assert set(modes.values()) == {0o666 & ~umask()}  # colleagues can load the weights
    state = read_json(run / "training_state.json")
    assert (state["stage"], state["pipeline_complete"], state["step"], state["total_steps"]) == ("complete", True, 4, 4)
    assert state["epoch"] == pytest.approx(4 / 6)
    assert (state["latest_checkpoint"], state["attempts"], state["error"]) == ("checkpoint-4", 1, None)


def test_metadata_tells_where_the_numbers_come_from(finished: tuple[Path, str, str], tiny_model: Path) -> None:
    metadata = read_json(finished[0] / "run_metadata.json")
    (attempt,) = metadata["attempts"]

    assert "forge.py --config" in attempt["command"]
    assert attempt["ranks"] == 1
    assert attempt["packages"]["torch"].startswith("2.")
    assert metadata["data"]["rows"] == {"train": 48, "matched": 13, "other": 7}
    assert metadata["data"]["truncated"]["train"] == 32  # premises of 10 and 15 words with 3 more and 3 marks
    assert len(metadata["data"]["fingerprint"]) == 64
    assert metadata["model"]["source"] == str(tiny_model)
    assert metadata["model"]["new_weights"] == ["classifier.bias", "classifier.weight"]
    assert metadata["model"]["parameters"] == 21059
    assert metadata["world"] == {
        **{
            "ranks": 1,
            "device": "cpu",
            "mixed_precision": "no",
            "deepspeed": None,
        },
        **{"rows_per_step": 8, "micro_batches_per_rank": 1},
    }


def test_metadata_compare_predicted_with_measured_memory(finished: tuple[Path, str, str]) -> None:
    memory = read_json(finished[0] / "run_metadata.json")["memory"]

    assert memory["device"] == "cpu"
    assert memory["measured"].startswith("peak resident set over training")
    assert memory["measured_gib_by_rank"] == [memory["measured_gib"]]
    parts = memory["predicted_parts"]
    expected = {"weights_gib": 4, "gradients_gib": 4, "optimizer_gib": 8}  # float32, one rank
    assert {name: parts[name] for name in expected} == {n: round(b * 21059 / 2**30, 6) for n, b in expected.items()}
    assert memory["predicted_gib"] == parts["total_gib"]
    assert 0 < memory["predicted_gib"] < 0.01  # 12 tokens a row
    assert 0 < memory["measured_gib"] < 0.5


def test_metrics_hold_baseline_steps_and_final_in_order(finished: tuple[Path, str, str]) -> None:
    rows = read_json_lines(finished[0] / "metrics.jsonl")

    assert [(row["step"], row.get("stage")) for row in rows] == [(0, "baseline"), (2, None), (4, None), (4, "final")]
    assert set(rows[1]) == {
        *("step", "epoch", "loss", "learning_rate", "grad_norm"),
        *("rows_per_second", "tokens_per_second", "peak_memory_mib"),
    }
    assert rows[1]["learning_rate"] == pytest.approx(5e-5)
    assert rows[2]["learning_rate"] == pytest.approx(5e-5 / 3)
    assert rows[0]["matched/rows"] == 13
    assert rows[0]["other/rows"] == 7
    assert rows[3]["matched/ce"] != rows[0]["matched/ce"]


def test_the_final_model_loads_and_gives_the_final_numbers(finished: tuple[Path, str, str], data_folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    final = finished[0] / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    rows = [json.loads(line) for line in (data_folder / "validation_other.jsonl").read_text().splitlines()]
    inputs = tokenizer(
        [row["premise"] for row in rows],
        [row["hypothesis"] for row in rows],
        truncation=True,
        max_length=12,
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([row["label"] for row in rows]))

    assert model.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}
    recorded = read_json_lines(finished[0] / "metrics.jsonl")[-1]["other/ce"]
    assert loss.item() == pytest.approx(recorded, abs=1e-5)


def test_the_model_card_has_the_numbers_before_and_after(finished: tuple[Path, str, str]) -> None:
    card = (finished[0] / "final" / "README.md").read_text()
    rows = read_json_lines(finished[0] / "metrics.jsonl")

    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-classification"
    assert f"| matched/ce | {rows[0]['matched/ce']:.4f} | {rows[-1]['matched/ce']:.4f} |" in card
    assert read_json(finished[0] / "run_metadata.json")["data"]["fingerprint"] in card


def test_the_log_holds_what_the_console_showed(finished: tuple[Path, str, str]) -> None:
    run, stdout, stderr = finished
    log = (run / "output.log").read_text()

    messages = [line.split(" ", 1)[1] for line in stderr.splitlines() if line[:2].isdigit() and line[2] == ":"]
    assert len(messages) > 10
    assert [message for message in messages if message.removeprefix("WARNING: ") not in log] == []
    for line in stdout.splitlines():
        assert line in log
    assert "matched/accuracy" in stdout
    assert "Traceback" not in log


def test_wandb_offline_leaves_its_run_in_the_run_directory(finished: tuple[Path, str, str]) -> None:
    (folder,) = (finished[0] / "wandb").glob("offline-run-*")
    run_id = read_json(finished[0] / "training_state.json")["run_id"]

    assert folder.name.endswith(run_id)
    contents = (folder / f"run-{run_id}.wandb").read_bytes()
    for key in (b"train/loss", b"eval/matched/accuracy", b"fingerprint"):
        assert key in contents


def test_the_recorded_config_runs_again_to_the_same_numbers(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    run, _, _ = finished
    again = forge(
        "--config", run / "config.yaml", "--output_root", tmp_path, "--set", "tracking.wandb=null", cwd=tmp_path
    )

    assert again.returncode == 0, again.stderr
    first, second = (read_json_lines(folder / "metrics.jsonl") for folder in (run, only_run(tmp_path)))
    assert [row.get("loss") for row in second] == [row.get("loss") for row in first]
    assert second[-1]["matched/ce"] == first[-1]["matched/ce"]


def test_an_existing_run_name_is_refused_and_a_complete_run_is_left_alone(finished: tuple[Path, str, str]) -> None:
    run, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    taken = forge("--config", run.parents[2] / "tiny.yaml", "--run_name", "first")
    resumed = forge("--resume", run)

    assert taken.returncode == 2
    assert "exists and is complete: choose another --run_name, such as first-2" in taken.stderr
    assert resumed.returncode == 0
    assert f"{run} is complete" in resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.usefixtures("warm_starts")
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_unbroken_end(config_file: Path, tmp_path: Path) -> None:
    settings = ["--config", config_file, "--set", "model.dropout=0.1", "--set", "training.max_steps=60"]
    whole = forge(*settings, "--run_name", "whole")
    assert whole.returncode == 0, whole.stderr
    runs = tmp_path / "outputs" / "tiny"
    command = [sys.executable, "forge.py", *map(str, settings), "--run_name", "killed"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # Polled: there is nothing else to wait for. Any of the later ones will do: each is there for a few steps only.
    while not [path for path in (runs / "killed").glob("checkpoint-*") if path.name != "checkpoint-3"]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_json(runs / "killed" / "training_state.json")["stage"] == "training"
    listed = subprocess.run(
        [sys.executable, "-m", "forge.cli", "runs", "--incomplete", "--output_root", str(tmp_path / "outputs")],
        **{"cwd": REPOSITORY, "capture_output": True, "text": True, "check": True},
    )
    assert "resume" in listed.stdout.splitlines()[-1]
    assert "killed" in listed.stdout
    taken = forge(*settings, "--run_name", "killed")
    assert taken.returncode == 2
    assert f"python forge.py --resume {runs / 'killed'}" in taken.stderr

    resumed = forge("--resume", runs / "killed")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (runs / "killed/final" / name).read_bytes() == (runs / "whole/final" / name).read_bytes()

    def curve(name: str) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in read_json_lines(runs / name / "metrics.jsonl") if "loss" in row]

    assert curve("killed") == curve("whole")
    state = read_json(runs / "killed" / "training_state.json")
    assert (state["attempts"], state["pipeline_complete"]) == (2, True)
    stages = [row["stage"] for row in read_json_lines(runs / "killed" / "metrics.jsonl") if "stage" in row]
    assert stages == ["baseline", "final"]


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.parametrize(("every_steps", "stage"), [("null", "final evaluation"), ("500", "step 40/")])
def test_a_run_without_a_checkpoint_starts_its_training_again(
    every_steps: str, stage: str, config_file: Path, tmp_path: Path
) -> None:
    """Nothing holds the weights of the steps that were taken: no fresh model may pass for a trained one."""
    settings = ["--config", config_file, "--max_steps", 60, "--set", f"checkpoint.every_steps={every_steps}"]
    whole = forge(*settings, "--run_name", "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "forge.py", *map(str, settings), "--run_name", "broken"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        assert any(stage in line for line in run.stderr)
        run.send_signal(signal.SIGINT)
        run.stderr.read()
    runs = tmp_path / "outputs" / "tiny"
    assert not read_json(runs / "broken" / "training_state.json")["pipeline_complete"]

    resumed = forge("--resume", runs / "broken")
    assert resumed.returncode == 0, resumed.stderr
    whole_model, model = (runs / name / "final" / "model.safetensors" for name in ("whole", "broken"))
    assert model.read_bytes() == whole_model.read_bytes()
    steps = [row["step"] for row in read_json_lines(runs / "broken" / "metrics.jsonl") if "stage" not in row]
    assert steps == list(range(1, 61))


def test_data_and_model_meet_by_label_name_through_the_whole_job(
    finished: tuple[Path, str, str], config_file: Path, tmp_path: Path
) -> None:
    """A finished model whose outputs are put into another order begins where it ended."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    final = finished[0] / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final)
    order = [2, 0, 1]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    names = [model.config.id2label[i].upper() for i in order]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(tmp_path / "permuted")
    AutoTokenizer.from_pretrained(final).save_pretrained(tmp_path / "permuted")
    done = forge(
        *("--config", config_file, "--max_steps", 1, "--run_name", "permuted"),
        *("--set", f"model.path={tmp_path / 'permuted'}", "--set", "task.max_length=12"),
    )

    assert done.returncode == 0, done.stderr
    after = read_json_lines(finished[0] / "metrics.jsonl")[-1]
    (before, _, _) = read_json_lines(tmp_path / "outputs" / "tiny" / "permuted" / "metrics.jsonl")
    compared = [name for name in after if name not in ("step", "stage") and not name.endswith("seconds")]
    assert len(compared) > 20
    assert {name: before[name] for name in compared} == pytest.approx({name: after[name] for name in compared})
    card = (tmp_path / "outputs" / "tiny" / "permuted" / "final" / "README.md").read_text()
    assert "Labels: CONTRADICTION, ENTAILMENT, NEUTRAL" in card


@pytest.mark.usefixtures("warm_starts")
def test_a_run_that_is_alive_is_not_resumed_and_an_interrupt_says_how_to_go_on(
    config_file: Path, tmp_path: Path
) -> None:
    settings = ["--config", config_file, "--max_steps", 5000, "--set", "checkpoint.every_steps=20"]
    command = [sys.executable, "forge.py", *map(str, settings), "--run_name", "alive"]
    run = tmp_path / "outputs" / "tiny" / "alive"
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as alive:
        assert alive.stderr is not None
        assert any("saved checkpoint-20" in line for line in alive.stderr)
        refused = forge("--resume", run)
        alive.send_signal(signal.SIGINT)
        last_words = alive.stderr.read()

    assert refused.returncode == 2
    assert f"is being trained by process {alive.pid} on " in refused.stderr
    assert "is being trained by process" in refused.stderr
    assert alive.returncode == 75
    assert "WARNING: stopped by SIGINT in training at step" in last_words
    assert f"forge.py --resume {run}`" in last_words
    assert "Traceback" not in last_words
    assert read_json(run / "training_state.json")["attempts"] == 1


def test_a_closed_console_does_not_spoil_a_finished_run(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "forge.py", "--config", str(config_file), "--debug", "--run_name"]
    shell = f"{shlex.join(command)} closed >&- 2>&-"
    closed = subprocess.run(["sh", "-c", shell], cwd=REPOSITORY, timeout=240, check=False)
    with warm.starts():
        piped = subprocess.Popen([*command, "piped"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert piped.stdout is not None
    piped.stdout.readline()
    piped.stdout.close()  # as `| head -1` does

    assert closed.returncode == 0
    assert piped.wait(timeout=240) == 0
    for name in ("closed", "piped"):
        run = tmp_path / "outputs" / "tiny" / name
        assert read_json(run / "training_state.json")["pipeline_complete"]
        log = (run / "output.log").read_text()
        assert "stage: final evaluation" in log
        assert "Traceback" not in log


def test_debug_runs_every_stage_in_two_steps_and_sends_nothing(config_file: Path, tmp_path: Path) -> None:
    done = forge("--config", config_file, "--debug", "--set", "tracking.wandb={project: x}")

    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "outputs")
    rows = read_json_lines(run / "metrics.jsonl")
    assert [(row["step"], row.get("stage")) for row in rows] == [(0, "baseline"), (1, None), (2, None), (2, "final")]
    assert not (run / "wandb").exists()


def test_a_broken_wandb_does_not_stop_training(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken" / "wandb").mkdir(parents=True)
    (tmp_path / "broken" / "wandb" / "__init__.py").write_text("raise RuntimeError('no service')\n")
    done = forge(
        *("--config", config_file, "--set", "tracking.wandb={project: x}", "--max_steps", 1),
        PYTHONPATH=str(tmp_path / "broken"),
    )

    assert done.returncode == 0, done.stderr
    assert "W&B failed and is off for the rest of this run (RuntimeError: no service)" in done.stderr


@pytest.mark.multiprocess
def test_two_ranks_take_the_same_trajectory_as_one(config_file: Path, tmp_path: Path) -> None:
    settings = ["--config", config_file, "--set", "training.per_device_batch_size=4", "--set", "training.batch_size=20"]
    alone = forge(*settings, "--run_name", "alone")
    both = forge_on_two_ranks(*settings, "--run_name", "both")
    assert alone.returncode == 0, alone.stderr
    assert both.returncode == 0, both.stderr

    from safetensors.torch import load_file

    runs = tmp_path / "outputs" / "tiny"
    one, two = (read_json_lines(runs / name / "metrics.jsonl") for name in ("alone", "both"))
    assert read_json(runs / "both" / "run_metadata.json")["world"]["ranks"] == 2
    assert [row["loss"] for row in two if "loss" in row] == pytest.approx(
        [row["loss"] for row in one if "loss" in row], rel=1e-5
    )
    assert [row["grad_norm"] for row in two if "loss" in row] == pytest.approx(
        [row["grad_norm"] for row in one if "loss" in row], rel=1e-4
    )
    for name in ("matched/ce", "other/ce"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-5)
    for name in ("matched/rows", "other/rows", "matched/accuracy", "other/labelled/neutral"):
        assert two[-1][name] == one[-1][name]
    weights, others = (load_file(runs / name / "final" / "model.safetensors") for name in ("alone", "both"))
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() < 1e-5, name


@pytest.mark.multiprocess
def test_an_error_on_any_rank_ends_all_of_them_with_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text("""
import sys
sys.path.insert(0, sys.argv[1])
from forge.ranks.accelerator import build_accelerator
from forge.ranks.agreement import on_every_rank, on_rank_0, rank_0_first
from forge.errors import ForgeError, UsageError

accelerator = build_accelerator("no", 0)
rank = accelerator.process_index

def fails_on(broken, error):
    def work():
        if rank == broken:
            raise error
        return rank
    return work

def call(run, work):
    return run(work) if run is on_every_rank else run(accelerator, work)

lines = []
assert on_rank_0(accelerator, lambda: f"of rank {rank}") == "of rank 0"
for run in (rank_0_first, on_every_rank, on_rank_0):
    assert call(run, lambda: 7) == 7
    for broken in (0, 1):
        try:
            lines.append(f"{run.__name__} {call(run, fails_on(broken, UsageError('bad input')))}")
        except ForgeError as error:
            lines.append(f"{run.__name__} {type(error).__name__} {error}")
    try:
        call(run, fails_on(0, OSError(28, 'full')))
    except OSError:
        lines.append(f"{run.__name__} its own")
    except ForgeError as error:
        lines.append(f"{run.__name__} {error}")
open(f"{sys.argv[2]}/{rank}", "w").write("\\n".join(lines))
accelerator.end_training()
""")
    done = forge_on_two_ranks(REPOSITORY, tmp_path, script=script)
    assert done.returncode == 0, done.stderr

    bad = "UsageError bad input"
    other = "another rank failed with OSError: [Errno 28] full"
    assert [(tmp_path / str(rank)).read_text().splitlines() for rank in (0, 1)] == [
        [
            *(f"rank_0_first {bad}", f"rank_0_first {bad}", "rank_0_first its own"),
            *(f"on_every_rank {bad}", f"on_every_rank {bad}", "on_every_rank its own"),
            *(f"on_rank_0 {bad}", "on_rank_0 0", "on_rank_0 its own"),
        ],
        [
            *(f"rank_0_first {bad}", f"rank_0_first {bad}", f"rank_0_first {other}"),
            *(f"on_every_rank {bad}", f"on_every_rank {bad}", f"on_every_rank {other}"),
            *(f"on_rank_0 {bad}", "on_rank_0 0", f"on_rank_0 {other}"),
        ],
    ]


@pytest.mark.multiprocess
def test_two_ranks_report_a_data_error_once_and_create_nothing(config_file: Path, tmp_path: Path) -> None:
    done = forge_on_two_ranks("--config", config_file, "--set", "task.columns.text=sentence")

    assert done.returncode == 1  # the launcher's own code; forge's is 2
    assert done.stderr.count("there is no column sentence; it has: premise, hypothesis, label") == 1
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.multiprocess
@pytest.mark.usefixtures("warm_starts")
def test_a_launcher_that_starts_one_process_of_two_is_found_out(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "forge/train.py"]
    done = subprocess.run(
        [*command, "--config", str(config_file)],
        **{"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 240, "check": False},
    )

    assert "asked for 2 processes but started one" in done.stderr
    assert not (tmp_path / "outputs").exists()


BAD_INPUT = {
    "missing column": (["task.columns.label=gold"], "there is no column gold; it has: premise, hypothesis, label"),
    "label outside": (
        ["task.labels=[entailment, neutral]"],
        "has the label 2, which is not one of entailment, neutral",
    ),
    "no such folder": (["task.dataset.path=./nowhere"], "task.dataset.path is ./nowhere, which does not exist"),
    "model offline": (["model.path=someone/some-model"], "HF_HUB_OFFLINE"),
    "data offline": (["task.dataset.name=someone/data"], "someone/data could not be loaded from the hub"),
    "no such model": (["model.path=./nowhere"], "model.path is ./nowhere, which does not exist"),
    "no package": (["model.path=package:nowhere/model"], "the package nowhere is not installed"),
    "too long": (["task.max_length=128"], "task.max_length is 128, but the tokenizer's model takes at most 64"),
    "fp16 on a CPU": (["training.mixed_precision=fp16"], "fp16, which needs a GPU"),
    "one column twice": (["task.columns.text_pair=premise"], "task.columns names the same column twice"),
    "odd sizes": (
        ["model.path=null", "model.config={model_type: bert, hidden_size: 33}"],
        "is built from model.config",
    ),
    "unwritable": (["output_root=/proc/forge"], "output root /proc/forge cannot be written"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_exits_2_with_a_sentence_and_creates_nothing(name: str, config_file: Path, tmp_path: Path) -> None:
    settings, sentence = BAD_INPUT[name]
    done = forge("--config", config_file, *(part for setting in settings for part in ("--set", setting)))

    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(("rows", "sentence"), [([], "is empty; forge needs"), (None, "has no validation split")])
def test_an_empty_or_absent_split_exits_2(
    rows: list[dict[str, object]] | None, sentence: str, config_file: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", pair_rows(6))
    if rows is not None:
        write_rows(tmp_path / "data" / "validation.jsonl", rows)
    done = forge("--config", config_file, "--set", f"task.dataset.path={tmp_path / 'data'}")

    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert not (tmp_path / "outputs").exists()
