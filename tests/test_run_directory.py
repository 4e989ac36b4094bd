"""A run gets a directory of its own, and is found again."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge.errors import UsageError
from forge.run import directory
from forge.run.directory import (
    RunDirectory,
    check_run_name,
    check_writable,
    create_run_directory,
    find_run,
    find_runs,
    valid_run_name,
)
from forge.run.hints import resume_command
from forge.run.state import Stage, TrainingState

CONFIG = Path("classification/mnli/distilbert/00_sft")


def test_the_files_of_a_run_have_the_names_of_the_house(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "first")
    assert run.name == "first"
    files = [run.config_file, run.metadata_file, run.state_file, run.log_file, run.metrics_file]
    assert [path.relative_to(run.path).as_posix() for path in [*files, run.final, run.latest_checkpoint_file]] == [
        "config.yaml",
        "run_metadata.json",
        "training_state.json",
        "output.log",
        "metrics.jsonl",
        "final",
        "latest_checkpoint",
    ]
    assert run.checkpoint(500) == tmp_path / "first" / "checkpoint-500"


def test_the_current_folder_as_a_run_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDirectory(Path(".")).name == tmp_path.name


# Creating.


def test_a_run_lies_below_its_config(tmp_path: Path) -> None:
    run = create_run_directory(tmp_path, CONFIG, "lr-5e-5_seed=1")
    assert run.path == tmp_path / CONFIG / "lr-5e-5_seed=1"
    assert run.path.is_dir()


def test_a_run_with_no_name_is_named_by_its_start_and_numbered_where_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "start_name", lambda: "2026-11-23_00-45-12")
    names = [create_run_directory(tmp_path, CONFIG, None).name for _ in range(3)]
    assert names == ["2026-11-23_00-45-12", "2026-11-23_00-45-12-2", "2026-11-23_00-45-12-3"]


def test_the_name_by_start_is_a_valid_name(tmp_path: Path) -> None:
    name = create_run_directory(tmp_path, CONFIG, None).name
    assert valid_run_name(name)
    assert len(name) == len("2026-11-23_00-45-12")


def test_an_unfinished_run_of_the_name_is_refused_with_the_resume_command(tmp_path: Path) -> None:
    run = a_run(tmp_path, "a b", "mine")
    with pytest.raises(UsageError) as refusal:
        create_run_directory(tmp_path, Path("a b"), "mine")
    assert f"{resume_command(run.path)}`, or" in str(refusal.value)  # as forge was started here
    assert resume_command(run.path).endswith(f"resume '{run.path}'")
    assert "such as mine-2" in str(refusal.value)


def test_a_complete_run_of_the_name_is_refused_with_another_name(tmp_path: Path) -> None:
    a_run(tmp_path, "sft", "mine", stage=Stage.COMPLETE, pipeline_complete=True)
    (tmp_path / "sft" / "mine-2").mkdir()
    with pytest.raises(UsageError) as refusal:
        create_run_directory(tmp_path, Path("sft"), "mine")
    assert "is complete" in str(refusal.value)
    assert "such as mine-3" in str(refusal.value)
    assert "--resume" not in str(refusal.value)


def test_a_folder_that_is_no_run_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "sft" / "mine").mkdir(parents=True)
    with pytest.raises(UsageError, match="mine exists but is not a run directory"):
        create_run_directory(tmp_path, Path("sft"), "mine")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-rf", "a/b", "a b", "naïve", "a\n", "a:b", "$x"])
def test_a_name_that_is_no_plain_folder_name_is_refused_and_nothing_is_created(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        create_run_directory(tmp_path, CONFIG, name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_the_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "classification").write_text("not a folder")
    with pytest.raises(UsageError, match=r"cannot be created: .*classification"):
        create_run_directory(tmp_path, CONFIG, "mine")


def test_a_run_inside_another_run_is_refused_because_it_would_not_be_found_again(tmp_path: Path) -> None:
    a_run(tmp_path, "x", "y")
    with pytest.raises(UsageError, match="is inside the run"):
        create_run_directory(tmp_path, Path("x/y"), "z")


def test_eight_runs_of_the_same_second_get_eight_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "start_name", lambda: "2026-11-23_00-45-12")
    names = created_by_eight_processes_at_once(tmp_path, None)
    assert sorted(names) == ["2026-11-23_00-45-12", *(f"2026-11-23_00-45-12-{n}" for n in range(2, 9))]


def test_of_eight_runs_of_the_same_name_one_gets_it(tmp_path: Path) -> None:
    names = created_by_eight_processes_at_once(tmp_path, "mine")
    assert sorted(names) == ["mine", *["refused"] * 7]


# Finding.


def test_runs_are_found_by_start_and_not_below_one_another(tmp_path: Path) -> None:
    second = a_run(tmp_path, "kd", "a", created_at="2026-11-23T09:00:00+00:00")
    first = a_run(tmp_path, "sft", "z", created_at="2026-11-22T09:00:00+00:00")
    for trap in (first.checkpoint(500), tmp_path / ".incomplete" / "trap"):
        trap.mkdir(parents=True)
        (trap / "training_state.json").write_text("{}")
    assert find_runs(tmp_path) == [first, second]


def test_a_run_with_a_broken_state_is_still_found(tmp_path: Path) -> None:
    run = a_run(tmp_path, "sft", "mine")
    run.state_file.write_text("{")
    assert find_runs(tmp_path) == [run]


def test_no_output_root_holds_no_runs(tmp_path: Path) -> None:
    assert find_runs(tmp_path / "nowhere") == []


def test_a_run_is_found_by_path_and_by_its_only_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, "sft", "mine")
    assert find_run(Path("/nowhere"), str(run.path)) == run
    assert find_run(tmp_path, "mine") == run
    (tmp_path / "elsewhere" / "mine").mkdir(parents=True)  # a folder of the name must not hide the run
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_run(tmp_path, "mine") == run


def test_a_name_that_two_runs_bear_is_refused_with_their_paths(tmp_path: Path) -> None:
    paths = [a_run(tmp_path, config, "mine").path for config in ("kd", "sft")]
    with pytest.raises(UsageError, match="2 runs") as refusal:
        find_run(tmp_path, "mine")
    assert all(str(path) in str(refusal.value) for path in paths)


def test_a_run_that_is_not_there_is_refused_with_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(a_run(tmp_path, "sft", "baseline").path)  # an empty RUN is not the current folder
    with pytest.raises(UsageError, match="did you mean baseline"):
        find_run(tmp_path, "basline")
    with pytest.raises(UsageError, match="forge runs"):
        find_run(tmp_path, "")
    with pytest.raises(UsageError, match="has no training_state"):
        find_run(tmp_path, str(tmp_path))


# Writable, before any work is done.


def test_a_root_that_does_not_exist_yet_is_fine_and_is_not_created(tmp_path: Path) -> None:
    check_writable(tmp_path / "outputs" / "deep")
    assert list(tmp_path.iterdir()) == []


def test_a_file_or_a_broken_link_in_the_way_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for root in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(UsageError, match="file is a file, not a folder"):
            check_writable(root)
    with pytest.raises(UsageError, match="link is a broken link"):
        check_writable(tmp_path / "link" / "deep")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_system_that_takes_no_files_is_refused() -> None:
    with pytest.raises(UsageError, match=r"output root /proc/outputs cannot be written: .* at /proc; give another"):
        check_writable(Path("/proc/outputs"))


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    as_root = os.getuid() == 0
    tmp_path.chmod(0o700 if as_root else 0o500)
    said = run_python(
        "import os, pathlib\n"
        "from forge.run.directory import check_writable\n"
        f"if {as_root}: os.setuid(65534)  # permission bits do not stop root\n"
        f"try: check_writable(pathlib.Path({str(tmp_path / 'outputs')!r}))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    tmp_path.chmod(0o700)
    assert said.startswith("UsageError output root")
    assert "Permission denied" in said


def test_the_probe_is_really_written(tmp_path: Path) -> None:
    said = run_python(
        "import pathlib, resource\n"
        "from forge.run.directory import check_writable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))  # half of the probe\n"
        f"try: check_writable(pathlib.Path({str(tmp_path)!r}))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    assert said.startswith(f"UsageError output root {tmp_path} cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_with_the_free_space(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system that could be filled")
    try:
        with pytest.raises(UsageError, match=r"the disk is full at .* \(0\.5 MiB free there\); free some space"):
            check_writable(tmp_path / "outputs")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("number", "why"), [(errno.EDQUOT, "your quota is used up"), (errno.ENOSPC, "the disk is full")]
)
def test_a_disk_that_refuses_at_the_last_moment_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, why: str
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UsageError, match=rf"{why} at .* MiB free"):
        check_writable(tmp_path)


def test_the_run_package_imports_nothing_heavy() -> None:
    loaded = run_python(
        "import sys\n"
        "import forge.run.directory, forge.run.registry, forge.run.provenance, forge.run.log\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    assert loaded == "[]"


def a_run(root: Path, config: str, name: str, **state: object) -> RunDirectory:
    run = create_run_directory(root, Path(config), name)
    TrainingState(run_id=name, **state).save(run.state_file)  # type: ignore[arg-type]
    return run


def created_by_eight_processes_at_once(root: Path, name: str | None) -> list[str]:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()

    def create() -> None:
        barrier.wait()
        try:
            results.put(create_run_directory(root, CONFIG, name).name)
        except UsageError:
            results.put("refused")

    processes = [context.Process(target=create) for _ in range(8)]
    for process in processes:
        process.start()
    names = [results.get(timeout=10) for _ in processes]
    for process in processes:
        process.join(timeout=10)
    return names


def run_python(code: str) -> str:
    """What the code prints, run where forge can be imported though it is not installed."""
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path: Path) -> None:
    """Of 300 characters: the file system refuses it with an OSError."""
    with pytest.raises(UsageError, match=r"no run in .* is named 'xxx.*…'"):
        find_run(tmp_path, "x" * 300)
    with pytest.raises(UsageError, match="is not allowed: use up to 200 letters"):
        check_run_name(tmp_path, Path("sft"), "x" * 230)


def test_a_file_as_output_root_is_not_a_folder_without_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, not a folder; give another --output_root"):
        find_runs(tmp_path / "file")
