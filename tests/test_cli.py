"""The true commands, as a user types them: their exit codes, their sentences, and that they answer at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge.cli.console import print_table
from forge.config.loader import load_config
from forge.run.directory import RunDirectory, create_run_directory
from forge.run.registry import register
from forge.run.state import Stage, TrainingState

REPO = Path(__file__).resolve().parents[1]
QUICKSTART = REPO / "configs" / "quickstart" / "sft.yaml"
DISTILBERT = REPO / "configs" / "classification" / "mnli" / "distilbert" / "00_sft.yaml"
WHOLE = "task: {type: classification, dataset: {path: data}}\nmodel: {path: m}\n"
HELP_LIMIT_S = 0.5

FORGE_PY = [str(REPO / "forge.py")]
TRAIN_PY = [str(REPO / "forge" / "train.py")]
CLI = ["-m", "forge.cli"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (FORGE_PY, "usage: forge.py"),
        (TRAIN_PY, "usage: forge.py"),
        (CLI, "usage: forge"),
        ([*CLI, "train"], "usage: forge train"),
        ([*CLI, "config", "show"], "usage: forge config show"),
        ([*CLI, "runs"], "usage: forge runs"),
    ],
)
def test_help_answers_at_once(entry: list[str], expected: str, tmp_path: Path) -> None:
    folder = REPO if entry[0] == "-m" else tmp_path
    best_s = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        done = run(*entry, "--help", folder=folder)
        best_s = min(best_s, (time.perf_counter() - start) / slowness())
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(expected)
        if best_s < HELP_LIMIT_S:
            break
    assert best_s < HELP_LIMIT_S


@pytest.mark.parametrize("entry", [FORGE_PY, TRAIN_PY, [*CLI, "train"]], ids=["forge.py", "train.py", "forge train"])
@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (WHOLE.replace("classification", "nope"), [],
         "c.yaml:1: task.type is `nope`; it must be one of classification, ocr, causal_lm"),
        (WHOLE + "trainig: {}\n", [], "c.yaml:3: trainig is not a config key; did you mean training?"),
        (WHOLE, ["--max_steps", "x"], "--max_steps: training.max_steps is `x`; it must be a whole number, or null"),
        ("a: [\n", [], "c.yaml:2: YAML syntax: expected the node content, but found '<stream end>' while parsing a "
         "flow node; check indentation, colons and brackets there"),
    ],
    ids=["unknown task", "misspelt key", "wrong flag", "syntax"],
)  # fmt: skip
def test_training_with_a_wrong_config_says_why_and_creates_nothing(
    entry: list[str], text: str, arguments: list[str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    done = run(*entry, "--config", "c.yaml", *arguments, folder=tmp_path, path=REPO if entry[0] == "-m" else None)
    assert done.returncode == 2
    assert sentences(done) == [expected]
    assert [file.name for file in tmp_path.iterdir()] == ["c.yaml"]


def test_training_with_a_missing_file_or_with_a_base_says_so(tmp_path: Path) -> None:
    done = run(*FORGE_PY, "--config", "x.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert sentences(done) == [f"x.yaml: there is no such config file; check the path (you are in {tmp_path})"]
    done = run(*FORGE_PY, "--config", "configs/base.yaml", folder=REPO)
    assert done.returncode == 2
    (sentence,) = sentences(done)
    assert sentence.startswith("configs/base.yaml: sets neither task nor model")


def test_a_resumed_run_keeps_its_name_and_its_size_and_must_exist(tmp_path: Path) -> None:
    done = run(*FORGE_PY, "--resume", "r", "--debug", "--run_name", "s", "--max_steps", "3", folder=tmp_path)
    assert (done.returncode, sentences(done)) == (
        2, ["--debug, --run_name cannot be combined with --resume: a resumed run stays what it is"]
    )  # fmt: skip
    done = run(*FORGE_PY, "--resume", "r", folder=tmp_path)
    assert (done.returncode, sentences(done)) == (
        2, ["no run in outputs is named 'r', and no run directory has that path; `forge runs` lists the runs"]
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*FORGE_PY], "error: one of the arguments --config X.yaml --resume is required; see `forge.py --help`\n"),
        (
            [*FORGE_PY, "--config", "a", "--resume", "b"],
            "error: argument --resume: not allowed with argument --config; see `forge.py --help`\n",
        ),
        (
            [*FORGE_PY, "--config", "a", "--max", "3"],
            "error: there is no flag --max; did you mean --max_steps?; see `forge.py --help`\n",
        ),
        (
            [*CLI, "run"],
            "error: argument COMMAND: invalid choice: 'run' (choose from 'train', 'launch', 'resume', 'config', "
            "'prove-resume', 'cache-teacher', 'plan', 'runs', 'compare'); see `forge --help`\n",
        ),
        (
            [*CLI, "train", "--config", "a", "--max", "3"],
            "error: there is no flag --max; did you mean --max_steps?; see `forge train --help`\n",
        ),
        (
            [*CLI, "train", "a", "--learning-rate=3"],
            "error: there is no flag --learning-rate; keys of the config are set by --set "
            "training.learning_rate=VALUE; see `forge train --help`\n",
        ),
        (
            [*FORGE_PY, "a", "--config", "b"],
            "error: argument --config: not allowed with argument X.yaml; see `forge.py --help`\n",
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: list[str], expected: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_validate_judges_each_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "bad.yaml").write_text(WHOLE + "training: {lr: 1, sed: 2}\n")
    (tmp_path / "notice.yaml").write_text(WHOLE + "distillation: {temperature: 4}\n")
    (tmp_path / "base.yaml").write_text("training: {seed: 1}\n")
    files = ["bad.yaml", "missing.yaml", str(QUICKSTART), "notice.yaml", "base.yaml"]
    done = run(*CLI, "config", "validate", *files, folder=tmp_path, path=REPO)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: bad.yaml:3: training.lr is not a config key; did you mean training.learning_rate?",
        "error: bad.yaml:3: training.sed is not a config key; did you mean training.seed?",
        f"error: missing.yaml: there is no such config file; check the path (you are in {tmp_path})",
    ]
    assert done.stdout.splitlines() == [
        f"{QUICKSTART}: valid",
        "notice.yaml: valid; without effect in this run: distillation.temperature "
        "(notice.yaml:3: distillation.alpha is 0)",
        "base.yaml: valid, but only a base for other configs: it sets neither task nor model",
    ]
    assert run(*CLI, "config", "validate", str(QUICKSTART), str(DISTILBERT)).returncode == 0
    (tmp_path / "data").rename(tmp_path / "date")
    done = run(*CLI, "config", "validate", "notice.yaml", folder=tmp_path, path=REPO)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: notice.yaml:1: task.dataset.path is data, which does not exist in {tmp_path}; did you mean date?\n",
    )


def test_a_path_that_does_not_exist_is_found_without_torch(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "c.yaml").write_text(
        WHOLE + "teacher: {path: ./teachr}\ndistillation: {alpha: 0.5}\noutput_root: ~/runs\n"
    )
    for command in (["train", "c.yaml"], ["launch", "c.yaml"]):
        done = run(*CLI, *command, folder=tmp_path, path=REPO)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert (
            f"c.yaml:3: teacher.path is ./teachr, which does not exist in {tmp_path}; did you mean teacher?"
            in done.stderr
        )
    done = run(*CLI, "config", "show", "c.yaml", folder=tmp_path, path=REPO)
    assert f"output_root: {Path.home() / 'runs'}" in done.stdout


def test_forge_alone_prints_its_help() -> None:
    done = run(*CLI)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("usage: forge ")


def test_show_names_the_origin_of_each_key() -> None:
    file = "configs/quickstart/sft.yaml"
    done = run(*CLI, "config", "show", file, "--origin", "--set", "training.seed=7", "--max_steps", "9")
    assert (done.returncode, done.stderr) == (0, "")
    written = {line.strip(): number for number, line in enumerate((REPO / file).read_text().splitlines(), start=1)}
    origins = dict(line.split("  # ") for line in done.stdout.splitlines() if "  # " in line)
    assert {key.strip(): origin for key, origin in origins.items()}.items() >= {
        "seed: 7": "--set training.seed=7",
        "max_steps: 9": "--max_steps",
        "demo: nli": f"{file}:{written['dataset: {demo: nli}']}",
        "weight_decay: 0.01": "configs/base.yaml:13",
        "max_rows: null": "default",
    }.items()


def test_show_prints_notices_beside_the_config(tmp_path: Path) -> None:
    done = run(*CLI, "config", "show", str(QUICKSTART), "--set", "distillation.temperature=4")
    assert done.returncode == 0
    assert "#" not in done.stdout
    assert done.stderr == (
        "notice: without effect in this run: distillation.temperature "
        "(--set distillation.temperature=4: distillation.alpha is 0)\n"
    )
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert run(*CLI, "config", "diff", str(QUICKSTART), str(tmp_path / "again.yaml")).stdout == "no difference\n"


def test_diff_names_each_key_that_differs(tmp_path: Path) -> None:
    bert = DISTILBERT.parents[1] / "bert_base" / "00_sft.yaml"
    done = run(*CLI, "config", "diff", str(DISTILBERT), str(bert))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "model.path: distilbert/distilbert-base-uncased -> google-bert/bert-base-uncased\n"
        "training.learning_rate: 5.0e-05 -> 3.0e-05\n"
    )
    done = run(*CLI, "config", "diff", "x.yaml", "y.yaml", folder=tmp_path, path=REPO)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == ["x.yaml", "y.yaml"]


def test_schema_is_json_with_descriptions() -> None:
    done = run(*CLI, "config", "schema")
    assert (done.returncode, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    rate = schema["$defs"]["TrainingConfig"]["properties"]["learning_rate"]
    assert (rate["description"], rate["type"]) == (
        "The peak learning rate, reached at the end of the warm-up.",
        ["number", "string"],
    )


def test_runs_lists_every_run_and_incomplete_those_that_can_go_on(tmp_path: Path) -> None:
    outputs = tmp_path / "out [a]"  # rich would take [a] for markup
    a_run(outputs, "done", complete=True)
    stopped = a_run(outputs, "stopped", error="OSError: [Errno 28] No space left\non the disk")
    broken = a_run(outputs, "broken")
    broken.state_file.write_text("{")

    def runs(*arguments: str, root: Path = outputs) -> "subprocess.CompletedProcess[str]":
        return run(*CLI, "runs", "--output_root", str(root), *arguments, folder=tmp_path, path=REPO)

    everything = runs("--json")
    assert everything.returncode == 0
    assert f"error: {broken.state_file} is broken" in everything.stderr
    first, second = json.loads(everything.stdout)
    assert {name: first[name] for name in ("run", "stage", "complete", "step")} == {
        "run": str(outputs / "sft" / "done"), "stage": "complete", "complete": True, "step": 5,
    }  # fmt: skip
    assert (second["run"], second["complete"], second["total_steps"]) == (str(stopped.path), False, 9)
    assert [row["run"] for row in json.loads(runs("--json", "--incomplete").stdout)] == [str(stopped.path)]

    table = runs(root=Path("./out [a]")).stdout
    assert "out [a]/sft/done" in table
    assert "5/9" in table
    assert "OSError: [Errno 28] No space left" in table
    listed = runs("--incomplete", root=Path("../") / tmp_path.name / "out [a]").stdout  # registered by another path
    assert "sft/done" not in listed
    assert listed.splitlines()[-1].endswith(f"-m forge.cli resume '../{tmp_path.name}/out [a]/sft/stopped'")
    assert runs(root=Path("empty")).stdout == "no runs under empty\n"
    assert runs("--incomplete", root=Path("empty")).stdout == "no incomplete runs under empty\n"
    assert runs("--json", root=Path("empty")).stdout == "[]\n"


def a_run(outputs: Path, name: str, *, complete: bool = False, error: str | None = None) -> RunDirectory:
    run = create_run_directory(outputs, Path("sft"), name)
    stage = Stage.COMPLETE if complete else Stage.TRAINING
    number = len(list(run.path.parent.iterdir()))
    state = TrainingState(
        run_id=f"id{number}", stage=stage, pipeline_complete=complete, step=5, total_steps=9, error=error,
        created_at=f"2026-11-23T00:00:0{number}+00:00",
    )  # fmt: skip
    state.save(run.state_file)
    if not complete:
        register(outputs, run, state.run_id, stage)
    return run


def run(*arguments: str, folder: Path = REPO, path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Python on the arguments, as in a fresh shell: without the test's own path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLUMNS", "RANK")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def sentences(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """The error lines of the log on stderr, without their time; anything else there is a failure."""
    lines = done.stderr.splitlines()
    assert all(" ERROR: " in line for line in lines), done.stderr
    assert done.stdout == ""
    return [line.split(" ERROR: ", 1)[1] for line in lines]


def slowness() -> float:
    """How much longer than on a quiet machine of 2024 an interpreter takes to start here and now; at least 1."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import argparse, json, typing"], check=True)
    return max(1.0, (time.perf_counter() - start) / 0.05)


def test_a_training_reads_no_answers() -> None:
    """A library that asks [y/N] gets none, at once, and not the lines of a script that started forge."""
    code = "from forge.cli.outcome import heard_signals\nheard_signals()\nprint(repr(input('[y/N] ')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, input="y\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[y/N] "
    assert "EOFError" in done.stderr


def test_a_piped_table_has_its_paths_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"outputs/{'x' * 300}/run"
    print_table(("run", "stage"), [(path, "training"), ("short", "complete")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["run", "stage"], [path, "training"], ["short", "complete"]]


def test_a_file_as_output_root_has_no_runs_to_list(tmp_path: Path) -> None:
    done = run(*CLI, "runs", "--output_root", str(QUICKSTART), folder=tmp_path, path=REPO)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is a file, not a folder" in done.stderr


def test_a_control_without_a_teacher_is_said_to_have_no_effect(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(WHOLE + "evaluation: {control: sft}\n")
    assert "evaluation.control (" in " ".join(load_config(tmp_path / "c.yaml").notices)
