"""Runs are compared by what differs: means with intervals over seeds, and refused where a number would mislead."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, forge
from recorded_runs import differs_from, of, read, write_run
from rich.console import Console

from forge.cli.main import main
from forge.errors import UsageError
from forge.report.comparison import Comparison, Line, as_json, compare_runs
from forge.report.estimate import estimate, student_t
from forge.report.figures import gap_closed, read_figures, seconds_per_step
from forge.report.groups import counts, group_runs
from forge.report.table import comparison_markdown, print_comparison
from forge.run.directory import RunDirectory
from forge.run.files import append_json_line, read_json_lines
from forge.run.state import Stage

T_2 = 0.95 * (2 / (1 - 0.95**2)) ** 0.5  # 4.302653: the 97.5 % quantile of t with 2 degrees of freedom, in closed form
KD = {"distillation.alpha": 0.9}
ACCURACY = "validation/accuracy"


def three(root: Path, name: str, accuracies: Sequence[float], **options: Any) -> list[RunDirectory]:
    """One run for each accuracy, with the seeds 1, 2, …."""
    return [
        write_run(root / f"{name}{seed}", of(ce=1 - accuracy, accuracy=accuracy), seed=seed, **options)
        for seed, accuracy in enumerate(accuracies, start=1)
    ]


def line_of(comparison: Comparison, label: str) -> Line:
    (found,) = [line for line in comparison.lines if line.label == label]
    return found


def labels(comparison: Comparison) -> list[str]:
    return [line.label for line in comparison.lines]


def printed(comparison: Comparison, width: int = 160) -> str:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width, markup=False))
    return out.getvalue()


def test_the_quantiles_are_those_of_the_tables() -> None:
    assert student_t(2) == pytest.approx(T_2, rel=1e-12)
    found = [student_t(degrees) for degrees in (1, 2, 4, 9, 30)]
    assert found == pytest.approx([12.706205, 4.302653, 2.776445, 2.262157, 2.042272], rel=1e-6)


def test_three_seeds_have_a_mean_and_an_interval(tmp_path: Path) -> None:
    comparison = compare_runs(three(tmp_path, "a", [0.80, 0.82, 0.84]))
    cell = line_of(comparison, "quickstart/sft").cells[ACCURACY]
    assert (cell.mean, cell.half_width) == pytest.approx((0.82, T_2 * 0.02 / 3**0.5), rel=1e-9)
    assert cell.values == {1: 0.80, 2: 0.82, 3: 0.84}
    assert "0.8200 ± 0.0497" in printed(comparison)
    assert "±: half-width of the 95 % interval of the mean over the seeds (Student's t)" in comparison.notes


def test_one_seed_is_a_value_without_an_interval(tmp_path: Path) -> None:
    comparison = compare_runs(three(tmp_path, "a", [0.81]))
    cell = line_of(comparison, "quickstart/sft").cells[ACCURACY]
    assert (cell.mean, cell.half_width) == (0.81, None)
    assert comparison.notes == ["one seed, so no interval; a difference between single runs may be chance"]
    assert "±" not in printed(comparison)


def test_two_seeds_have_a_wide_interval_and_what_is_not_finite_has_none() -> None:
    assert estimate({1: 1.0, 2: 3.0}).half_width == pytest.approx(12.706205, rel=1e-6)  # s / sqrt(n) is 1
    broken = estimate({1: 1.0, 2: float("inf")})
    assert (str(broken.mean), broken.half_width) == ("nan", None)


@pytest.mark.parametrize(
    ("key", "counted"),
    [
        ("training.seed", False),
        ("output_root", False),
        ("logging.every_steps", False),
        ("tracking.wandb.project", False),
        ("checkpoint.every_steps", False),
        ("export.dtype", False),
        ("evaluation.every_steps", False),
        ("training.num_workers", False),
        ("training.gradient_checkpointing", False),
        ("task.dataset.path", False),
        ("evaluation.max_rows", True),
        ("training.learning_rate", True),
        ("training.max_steps", True),  # a resume may change them, and the numbers do too
        ("training.epochs", True),
        ("teacher.placement", True),
        ("distillation.alpha", True),
        ("model.path", True),
        ("task.dataset.max_rows", True),
        ("a.key.to.come", True),
    ],
)
def test_what_can_change_the_numbers_counts(key: str, counted: bool) -> None:
    assert counts(key) is counted


def test_runs_that_differ_only_in_seed_and_paths_are_one_group(tmp_path: Path) -> None:
    moved = {"logging.every_steps": 5, "output_root": "/elsewhere", "tracking.wandb": {"project": "x"}}
    spread = {"training.batch_size": None, "training.per_device_batch_size": 8,
              "training.gradient_accumulation_steps": 4, "training.mixed_precision": "no"}  # fmt: skip
    runs = [
        write_run(tmp_path / "a", of(accuracy=0.8), seed=3),
        write_run(tmp_path / "b", of(accuracy=0.8), seed=1, settings=moved),
        write_run(tmp_path / "c", of(accuracy=0.8), seed=2, settings=spread),
    ]
    (group,) = compare_runs(runs).groups
    assert (group.seeds, group.label, group.differs) == ([1, 2, 3], "quickstart/sft", {})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"settings": {"training.max_steps": 200}}, ["training.max_steps 100", "training.max_steps 200"]),
        ({"world": {"rows_per_step": 64}}, ["training.batch_size 32", "training.batch_size 64"]),
        ({"world": {"mixed_precision": "bf16"}}, ["training.mixed_precision 'no'", "training.mixed_precision bf16"]),
        ({"settings": KD}, ["distillation.alpha 0.0", "distillation.alpha 0.9"]),  # the teacher goes without saying
        ({"settings": {"model.lora": {"rank": 8}}}, ["model.lora null", "model.lora.rank 8"]),
        (
            {"settings": {"model.path": "/models/student/small"}},
            ["model.path student", "model.path /models/student/small"],
        ),
        (
            {"settings": {"training.learning_rate": 1e-3, "model.dropout": 0.0}},
            ["model.dropout null, training.learning_rate 5.0e-05", "model.dropout 0.0, training.learning_rate 0.001"],
        ),
    ],
)
def test_a_label_says_what_differs_and_no_more(options: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", of(accuracy=0.8)), write_run(tmp_path / "b", of(accuracy=0.8), **options)]
    groups, legend = group_runs([read_figures(run) for run in runs])
    wide = max(map(len, expected)) > 48  # not replaced by names: both come from one config
    assert ([group.label for group in groups], legend, wide) == (expected, [], "model.dropout" in expected[0])


def test_only_the_part_of_a_path_that_differs_is_shown(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, of(accuracy=0.8), settings={**KD, "teacher.path": f"/some/runs/{name}/final"})
        for name in ("big", "small")
    ]
    groups, _ = group_runs([read_figures(run) for run in runs])
    assert [group.label for group in groups] == ["teacher.path big/final", "teacher.path small/final"]


def test_three_kinds_of_groups_are_distinguished_by_few_keys(tmp_path: Path) -> None:
    settings = [{}, KD, {**KD, "distillation.temperature": 4.0}]
    runs = [write_run(tmp_path / str(i), of(accuracy=0.8), settings=item) for i, item in enumerate(settings)]
    groups, _ = group_runs([read_figures(run) for run in runs])
    assert [group.label for group in groups] == [
        "distillation.alpha 0.0",
        "distillation.alpha 0.9, distillation.temperature 2.0",
        "distillation.alpha 0.9, distillation.temperature 4.0",
    ]
    assert groups[0].differs == {"distillation.alpha": 0.0}
    assert groups[1].differs == {"teacher.path": "teacher", "distillation.alpha": 0.9, "distillation.temperature": 2.0}


def test_long_labels_are_replaced_by_the_names_of_configs(tmp_path: Path) -> None:
    many = {**KD, "training.learning_rate": 1e-3, "training.weight_decay": 0.1}
    runs = [
        write_run(tmp_path / "a", of(accuracy=0.8), config_file="/x/configs/mnli/distilbert/00_sft.yaml"),
        write_run(tmp_path / "b", of(accuracy=0.8), config_file="/x/configs/mnli/distilbert/01_kd.yaml", settings=many),
    ]
    comparison = compare_runs(runs)
    assert [group.label for group in comparison.groups] == ["00_sft", "01_kd"]
    assert comparison.legend == [
        "00_sft: distillation.alpha 0.0, training.learning_rate 5.0e-05, training.weight_decay 0.01",
        "01_kd: distillation.alpha 0.9, training.learning_rate 0.001, training.weight_decay 0.1",
    ]
    assert comparison.legend[1] in printed(comparison)


def test_keys_missing_from_an_older_forge_have_their_defaults(tmp_path: Path) -> None:
    runs = three(tmp_path, "a", [0.8, 0.9])
    tree = yaml.safe_load(runs[0].config_file.read_text())
    del tree["training"]["weight_decay"], tree["model"]["continue_adapter"]
    runs[0].config_file.write_text(yaml.safe_dump(tree))
    assert len(compare_runs(runs).groups) == 1


def test_keys_of_a_newer_forge_are_shown_as_recorded(tmp_path: Path) -> None:
    runs = three(tmp_path, "a", [0.8, 0.9])
    tree = yaml.safe_load(runs[1].config_file.read_text())
    tree["distillation"]["charm"] = 3
    runs[1].config_file.write_text(yaml.safe_dump(tree))
    assert [group.label for group in compare_runs(runs).groups] == ["no distillation.charm", "distillation.charm 3"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fingerprint": "0123456789abcdef"}, "data fingerprint 963c2d6e6018 and 0123456789ab;"),
        ({"settings": {"evaluation.max_rows": 50}}, "evaluation.max_rows null and 50;"),
        ({"final": of("matched", accuracy=0.8)}, "splits validation and matched;"),
        ({"final": of(accuracy=0.8, rows=999)}, "evaluated rows validation 1000 and validation 999;"),
    ],
)
def test_numbers_of_other_rows_are_refused(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", of(accuracy=0.8))
    b = write_run(tmp_path / "b", **{"final": of(accuracy=0.8), "seed": 2, **options})
    with pytest.raises(UsageError) as error:
        compare_runs([a, b])
    assert str(error.value).startswith(f"{a.path} and {b.path} ")
    assert f": {sentence} " in str(error.value)


def test_incomplete_runs_are_named_with_their_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", of(accuracy=0.8))
    at = {"stage": Stage.TRAINING, "pipeline_complete": False, "step": 40}
    b = write_run(tmp_path / "b", state=at)
    early = write_run(
        tmp_path / "c", state={"stage": Stage.SETUP, "pipeline_complete": False, "step": 0, "total_steps": 0}
    )
    assert main(["compare", "a", "b", "c", "--output_root", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert f": {b.path} (training, step 40/100), {early.path} (setup, step 0/?);" in printed
    assert "`forge resume RUN`" in printed
    assert main(["compare", "a", "b", "--output_root", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("or leave it out\n")


def test_a_run_without_a_final_evaluation_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", baseline=of(accuracy=0.3))
    with pytest.raises(UsageError, match="a has no final evaluation"):
        compare_runs([run])


def test_a_seed_counts_once(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, of(accuracy=0.8), seed=7) for name in "ab")
    with pytest.raises(UsageError, match=r"a and .*b have the same config and the same seed \(7\)"):
        compare_runs([a, b])
    again = RunDirectory(tmp_path / "b" / ".." / "a")
    assert compare_runs([a, again]).groups[0].seeds == [7]  # one run under two names


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (lambda run: run.config_file.unlink(), "config.yaml cannot be read"),
        (lambda run: run.config_file.write_text("a: ["), "config.yaml cannot be read"),
        (lambda run: run.config_file.write_text("3"), "config.yaml does not hold a config"),
        (lambda run: run.metadata_file.write_text("{}"), "run_metadata.json is broken: run_id is missing"),
        (lambda run: run.metrics_file.unlink(), "has no final evaluation"),
    ],
)  # fmt: skip
def test_a_broken_run_is_named(broken: Any, sentence: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", of(accuracy=0.8), state={"step_sizes": []})
    broken(run)
    with pytest.raises(UsageError) as error:
        compare_runs([run])
    assert sentence in str(error.value)
    assert str(run.path) in str(error.value)


def test_the_paired_difference_is_over_the_common_seeds(tmp_path: Path) -> None:
    sft = three(tmp_path, "sft", [0.80, 0.82, 0.84, 0.10])
    kd = three(tmp_path, "kd", [0.83, 0.85, 0.84], settings=KD)
    comparison = compare_runs([*kd, *sft])  # the difference is distilled minus control, in any order
    by_metric = {item.metric: item for item in comparison.paired}
    assert list(by_metric) == ["validation/ce", ACCURACY]
    found = by_metric[ACCURACY]
    assert (found.left, found.right) == ("distillation.alpha 0.9", "distillation.alpha 0.0")
    assert found.difference.values == pytest.approx({1: 0.03, 2: 0.03, 3: 0.0}, abs=1e-12)
    # mean 0.02; s^2 = (0.01^2 + 0.01^2 + 0.02^2) / 2 = 0.0003; s / sqrt(3) = 0.01
    assert (found.difference.mean, found.difference.half_width) == pytest.approx((0.02, T_2 * 0.01), rel=1e-9)
    text = printed(comparison)
    assert "distillation.alpha 0.9 minus distillation.alpha 0.0, seed by seed:" in text
    assert "validation/accuracy: +0.0200 ± 0.0430 (seeds 1, 2, 3)" in text
    assert "validation/ce: -0.0200 ± 0.0430 (seeds 1, 2, 3)" in text


def test_without_a_control_the_difference_is_later_minus_earlier(tmp_path: Path) -> None:
    slow, fast = three(tmp_path, "a", [0.8]), three(tmp_path, "b", [0.9], settings={"training.learning_rate": 1e-3})
    found = compare_runs([*slow, *fast]).paired[1]
    assert (found.metric, found.difference.mean) == (ACCURACY, pytest.approx(0.1))
    assert found.difference.half_width is None
    assert "+0.1000 (seed 1 only)" in printed(compare_runs([*slow, *fast]))


def test_no_difference_of_groups_that_share_no_seed_or_are_three(tmp_path: Path) -> None:
    one, two = three(tmp_path, "a", [0.8, 0.8]), three(tmp_path, "b", [0.9], settings=KD)
    other = write_run(tmp_path / "c", of(accuracy=0.7), seed=1, settings={"distillation.alpha": 0.5})
    apart = write_run(tmp_path / "d", of(accuracy=0.7), seed=9, settings={"distillation.alpha": 0.1})
    assert compare_runs([*one, *two, other]).paired == []
    assert compare_runs([*one, apart]).paired == []
    assert len(compare_runs([*one, *two, apart]).paired) == 2  # the third group shares no seed


def test_a_control_with_the_same_steps_is_a_twin_whichever_key_set_them(tmp_path: Path) -> None:
    """evaluation.control writes the steps into its config, where that of its run may have epochs."""
    by_epochs = {"training.max_steps": None, "training.epochs": 2.0}
    taken = {"step": 70, "total_steps": 70}
    kd = write_run(tmp_path / "kd", of(ce=0.5), teacher=of(ce=0.4), settings=KD | by_epochs, state=taken)
    sft = write_run(tmp_path / "sft", of(ce=0.6), settings={"training.max_steps": 70})
    other = write_run(tmp_path / "short", of(ce=0.9), settings={"training.max_steps": 50})
    comparison = compare_runs([kd, sft, other])
    assert labels(comparison)[:2] == ["distillation.alpha 0.9, training.max_steps 70", "gap closed"]
    assert line_of(comparison, "gap closed").groups == (0, 1)
    assert comparison.groups[1].differs == {"distillation.alpha": 0.0, "training.max_steps": 70}
    assert not [note for note in comparison.notes if "control" in note.split(":")[0]]
    assert not [note for note in comparison.notes if "differs" in note]
    again = write_run(tmp_path / "again", of(ce=0.6), settings=by_epochs, state=taken)
    with pytest.raises(UsageError, match=r"the same config and the same seed \(1\)"):
        compare_runs([sft, again])


def test_the_gap_is_closed_from_the_control_to_the_teacher(tmp_path: Path) -> None:
    teacher = of(ce=0.10, accuracy=0.90)
    sft = three(tmp_path, "sft", [0.80, 0.82, 0.84])
    kd = three(tmp_path, "kd", [0.84, 0.83, 0.85], settings=KD, teacher=teacher)
    comparison = compare_runs([*sft, *kd])
    assert labels(comparison) == ["distillation.alpha 0.0", "distillation.alpha 0.9", "gap closed", "teacher"]
    cells = line_of(comparison, "gap closed").cells
    # accuracy (0.84 - 0.82) / (0.90 - 0.82); ce (0.16 - 0.18) / (0.10 - 0.18)
    assert (cells[ACCURACY].mean, cells["validation/ce"].mean) == pytest.approx((0.25, 0.25), rel=1e-9)
    assert line_of(comparison, "teacher").cells[ACCURACY].half_width is None  # one model, whichever seed
    assert printed(comparison).count("25 %") == 2


@pytest.mark.parametrize(
    ("metric", "before", "after", "teacher", "expected"),
    [
        ("v/accuracy", 0.80, 0.85, 0.90, 0.5),
        ("v/accuracy", 0.80, 0.75, 0.90, -0.5),  # worse than the control
        ("v/accuracy", 0.80, 0.95, 0.90, 1.5),  # better than the teacher
        ("v/accuracy", 0.90, 0.85, 0.80, None),  # a teacher that is worse: no gap
        ("v/accuracy", 0.90, 0.85, 0.9005, None),  # tiny
        ("v/accuracy", 0.90, 0.85, 0.90, None),
        ("v/ce", 0.5, 0.4, 0.3, 0.5),
        ("v/ce", 0.3, 0.4, 0.5, None),
        ("v/ce", 0.3, 0.4, 0.3, None),
        ("v/cer", 0.5, 0.4, 0.3, 0.5),
        ("v/perplexity", 30.0, 25.0, 10.0, 0.25),
        ("v/ce", float("nan"), 0.4, 0.3, None),
        ("v/ce", 0.5, float("inf"), 0.3, None),
    ],
)
def test_the_share_of_a_gap(metric: str, before: float, after: float, teacher: float, expected: float | None) -> None:
    assert gap_closed(metric, before, after, teacher) == (None if expected is None else pytest.approx(expected))


def test_a_control_that_differs_in_more_is_named_and_two_of_them_are_ambiguous(tmp_path: Path) -> None:
    numbers = {"teacher": of(ce=0.1, accuracy=0.9)}
    kd = three(tmp_path, "kd", [0.85], settings={**KD, "training.learning_rate": 1e-3}, **numbers)
    other = three(tmp_path, "sft", [0.80])
    comparison = compare_runs([*other, *kd])
    assert line_of(comparison, "gap closed").cells[ACCURACY].mean == pytest.approx(0.5)
    assert comparison.notes[0].endswith("differs in more than the distillation")
    third = three(tmp_path, "third", [0.70], settings={"training.learning_rate": 2e-3})
    assert "gap closed" not in labels(compare_runs([*other, *third, *kd]))
    twin = three(tmp_path, "twin", [0.75], settings={"training.learning_rate": 1e-3})
    comparison = compare_runs([*other, *twin, *kd])  # its own twin among two
    assert line_of(comparison, "gap closed").cells[ACCURACY].mean == pytest.approx(2 / 3)
    assert not any("differs" in note for note in comparison.notes)


def test_students_with_the_same_start_share_one_untrained_line(tmp_path: Path) -> None:
    """The control knows no agreement; rounding differs; each seed has a head of its own."""
    runs = []
    for seed in (1, 2):
        before, more = 0.30 + seed / 100, {"agreement": 0.25 + seed / 100}
        for name, settings, numbers in (("sft", {}, {}), ("kd", KD, more)):
            shift = 1e-7 if name == "kd" else 0.0
            runs.append(
                write_run(
                    tmp_path / f"{name}{seed}",
                    of(accuracy=0.8, **({"agreement": 0.9} if name == "kd" else {})),
                    baseline=of(accuracy=before + shift, **numbers, seconds=shift),
                    seed=seed,
                    settings=settings,
                )
            )
    comparison = compare_runs(runs)
    line = line_of(comparison, "untrained")
    assert line.groups == (0, 1)
    assert line.cells[ACCURACY].values == {1: 0.31, 2: 0.32}
    assert line.cells["validation/agreement"].mean == pytest.approx(0.265)
    assert line.cells[ACCURACY].half_width == pytest.approx(12.706205 * 0.005, rel=1e-5)
    (row,) = [text.split() for text in printed(comparison).splitlines() if text.startswith(" untrained")]
    assert row[1] == "2"  # seeds


def test_students_with_different_starts_have_a_line_each(tmp_path: Path) -> None:
    a = three(tmp_path, "a", [0.8, 0.8], baseline=of(accuracy=0.330))
    b = three(tmp_path, "b", [0.8], baseline=of(accuracy=0.331), settings={"model.path": "other"})
    comparison = compare_runs([*a, *b])
    assert labels(comparison)[:2] == ["untrained: model.path student", "untrained: model.path other"]
    assert comparison_markdown(comparison, 160).splitlines()[2].split(" | ")[1:] == ["-", "-", "0.3300 |"]
    cell = line_of(comparison, "untrained: model.path student").cells[ACCURACY]
    assert (cell.mean, cell.half_width) == (0.330, None)  # no seed touched it


def test_equal_untrained_numbers_are_one_line_even_without_common_seeds(tmp_path: Path) -> None:
    a = three(tmp_path, "a", [0.8], baseline=of(accuracy=0.33))
    b = write_run(tmp_path / "b", of(accuracy=0.8), baseline=of(accuracy=0.33), seed=2, settings=KD)
    assert labels(compare_runs([*a, b]))[0] == "untrained"
    c = write_run(tmp_path / "c", of(accuracy=0.8), baseline=of(accuracy=0.34), seed=3, settings=KD)
    assert len([line for line in compare_runs([*a, c]).lines if line.kind == "untrained"]) == 2


def test_lines_without_a_common_metric_stay_apart(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", of(ce=0.5, accuracy=0.8), baseline=of(ce=1.1))
    b = write_run(tmp_path / "b", of(ce=0.5, accuracy=0.8), baseline=of(accuracy=0.3), settings=KD)
    assert len([line for line in compare_runs([a, b]).lines if line.kind == "untrained"]) == 2


def test_two_teachers_have_a_line_each(tmp_path: Path) -> None:
    a = three(tmp_path, "a", [0.8], teacher=of(accuracy=0.90), settings={**KD, "teacher.path": "big"})
    b = three(tmp_path, "b", [0.8], teacher=of(accuracy=0.95), settings={**KD, "teacher.path": "huge"})
    assert labels(compare_runs([*a, *b]))[-2:] == ["teacher: teacher.path big", "teacher: teacher.path huge"]


def test_agreement_kl_and_ece_follow_the_headline_if_they_exist(tmp_path: Path) -> None:
    numbers = of(ce=0.5, accuracy=0.8, ece=0.1) | of("hard", ce=0.7, accuracy=0.6, ece=0.2)
    with_teacher = {"validation/agreement": 0.9, "validation/kl": 0.05}
    runs = [
        write_run(tmp_path / "a", numbers),
        write_run(tmp_path / "b", numbers | with_teacher, settings=KD),
        write_run(tmp_path / "c", numbers, settings=KD, seed=2),
    ]
    comparison = compare_runs(runs)
    first = [f"validation/{name}" for name in ("ce", "accuracy", "agreement", "kl", "ece")]
    assert comparison.metrics == [*first, "hard/ce", "hard/accuracy", "hard/ece"]
    assert "distillation.alpha 0.9: some seeds lack validation/agreement, validation/kl" in comparison.notes
    assert [item.metric for item in comparison.paired] == [*first[:2], "hard/ce", "hard/accuracy"]


def test_chosen_metrics(tmp_path: Path) -> None:
    numbers = of(ce=0.5, accuracy=0.8) | of("hard", ce=0.7, accuracy=0.6)
    run = write_run(tmp_path / "a", numbers)
    assert compare_runs([run], ["accuracy"]).metrics == [ACCURACY, "hard/accuracy"]
    assert compare_runs([run], ["hard/ce", "correct/neutral", "ce"]).metrics == [
        "hard/ce", "validation/correct/neutral", "hard/correct/neutral", "validation/ce"
    ]  # fmt: skip
    for former, name in (("loss", "ce"), ("hard/loss", "hard/ce")):
        with pytest.raises(UsageError, match=rf"--metric {former}: no final evaluation has it; did you mean {name}\?"):
            compare_runs([run], [former])
    with pytest.raises(UsageError, match=r"--metric acuracy: no final evaluation has it; did you mean accuracy\?"):
        compare_runs([run], ["acuracy"])


def test_seconds_per_step_weigh_reports_by_their_steps() -> None:
    rows = [
        {"step": 0, "stage": "baseline", "v/ce": 1.0},
        {"step": 10, "rows_per_second": 32.0},  # 10 steps of 1 s
        {"step": 10, "stage": "training", "v/ce": 1.0},
        {"step": 40, "rows_per_second": 64.0},  # 30 steps of half a second
        {"step": 45, "rows_per_second": "inf"},  # not counted
    ]
    assert seconds_per_step(rows, [[0, 32]]) == pytest.approx((10 + 15) / 40)
    # From step 20 on a step has twice the rows: 10 of half a second, 20 of a whole one.
    assert seconds_per_step(rows, [[0, 32], [20, 64]]) == pytest.approx((10 + 5 + 20) / 40)
    assert seconds_per_step(rows[:1], [[0, 32]]) is None


def test_the_time_per_step_is_a_column(tmp_path: Path) -> None:
    report = {"step": 100, "rows_per_second": 64.0}
    comparison = compare_runs([write_run(tmp_path / "a", of(accuracy=0.8), reports=[report])])
    assert line_of(comparison, "quickstart/sft").seconds_per_step == estimate({1: 0.5})
    assert "s/step" in printed(comparison)
    without = compare_runs([write_run(tmp_path / "b", of(accuracy=0.8))])
    assert "s/step" not in printed(without)


def test_a_mixture_of_machines_is_noted(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", of(accuracy=0.8)),
        write_run(tmp_path / "b", of(accuracy=0.8), seed=2, world={"device": "cuda", "ranks": 2}),
    ]
    assert "quickstart/sft: the time per step is from runs on different devices or numbers of ranks" in (
        compare_runs(runs).notes
    )


def test_rows_drawn_with_the_seed_are_noted(tmp_path: Path) -> None:
    final = of(accuracy=0.8, rows=50, rows_of=1000)
    run = write_run(tmp_path / "a", final, settings={"evaluation.max_rows": 50})
    assert any(note.startswith("evaluated on 50 of 1000 rows of validation") for note in compare_runs([run]).notes)


def kd_table(root: Path, alphas: Sequence[float]) -> Comparison:
    """Groups with eight metrics in two splits, over three seeds each."""
    names = ("ce", "accuracy", "agreement", "kl")
    runs = [
        write_run(
            root / f"{alpha}-{seed}",
            {**of(**dict.fromkeys(names, seed / 10)), **of("other", **dict.fromkeys(names, seed / 20))},
            seed=seed,
            settings={"distillation.alpha": alpha},
        )
        for alpha in alphas
        for seed in (1, 2, 3)
    ]
    return compare_runs(runs)


def test_a_table_that_is_too_wide_is_transposed(tmp_path: Path) -> None:
    comparison = kd_table(tmp_path, [0.0, 0.5, 0.9])
    wide, narrow = printed(comparison, 220).splitlines(), printed(comparison, 100).splitlines()
    assert wide[0].split() == ["seeds", *comparison.metrics]
    assert wide[1].startswith(" distillation.alpha 0.0      3  0.2000 ± 0.2484")
    assert max(map(len, narrow)) <= 100
    assert re.split("  +", narrow[0].strip()) == [f"distillation.alpha {alpha}" for alpha in (0.0, 0.5, 0.9)]
    assert [line.split()[0] for line in narrow[1:10]] == ["seeds", *comparison.metrics]
    assert narrow[2].split()[1:] == ["0.2000", "±", "0.2484"] * 3


def test_many_groups_come_in_blocks(tmp_path: Path) -> None:
    alphas = [0.1, 0.2, 0.3, 0.4, 0.5]
    lines = printed(kd_table(tmp_path, alphas), 70).splitlines()
    assert max(map(len, lines)) <= 70
    assert [line.count("distillation.alpha") for line in lines if "distillation.alpha" in line] == [2, 2, 1]
    assert sum(line.startswith(" other/kl") for line in lines) == 3


def test_a_gap_stays_next_to_the_group_that_closed_it(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / str(alpha),
            of(ce=0.2, accuracy=0.8, macro_f1=0.8),
            settings={"distillation.alpha": alpha},
            teacher=of(ce=0.1, accuracy=0.9, macro_f1=0.9),
        )
        for alpha in (0.0, 0.5, 0.9)
    ]
    lines = printed(compare_runs(runs), 72).splitlines()
    heads = [re.split("  +", line.strip()) for line in lines if "distillation.alpha" in line][:3]
    assert heads == [
        ["distillation.alpha 0.0"],  # there is room for the next, but not for its gap
        ["distillation.alpha 0.5", "gap closed"],
        ["distillation.alpha 0.9", "gap closed", "teacher"],
    ]


def test_markdown(tmp_path: Path) -> None:
    teacher = of(ce=0.1, accuracy=0.9)
    sft, kd = three(tmp_path, "sft", [0.8]), three(tmp_path, "kd", [0.85], settings=KD, teacher=teacher)
    assert (
        comparison_markdown(compare_runs([*sft, *kd], ["accuracy"]), 160)
        == """\
|  | seeds | validation/accuracy |
| --- | --- | --- |
| distillation.alpha 0.0 | 1 | 0.8000 |
| distillation.alpha 0.9 | 1 | 0.8500 |
| gap closed | - | 50 % |
| teacher | - | 0.9000 |

- distillation.alpha 0.9 minus distillation.alpha 0.0, seed by seed:
  - validation/accuracy: +0.0500 (seed 1 only)
- one seed, so no interval; a difference between single runs may be chance
- gap closed: (distilled - control) / (teacher - control), from the means; - if the teacher is not better than the \
control
"""
    )
    transposed = comparison_markdown(compare_runs([*sft, *kd], ["accuracy"]), 38).splitlines()
    assert transposed[0] == "|  | distillation.alpha 0.0 | distillation.alpha 0.9 | gap closed | teacher |"
    assert transposed[3] == "| validation/accuracy | 0.8000 | 0.8500 | 50 % | 0.9000 |"


def test_json_holds_every_number_of_every_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", of(ce="inf", accuracy=0.8), baseline=of(ce=1.1, accuracy=0.3))
    append_json_line(a.metrics_file, {"step": 50, "stage": "training", **of(ce=0.7)})
    write_run(tmp_path / "b", of(ce=0.4, accuracy=0.9), seed=2, baseline=of(ce=1.1, accuracy=0.3))
    assert main(["compare", "a", str(tmp_path / "b"), "--json", "--output_root", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"][0]["seeds"] == [1, 2]
    assert [run["path"] for run in found["groups"][0]["runs"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    evaluations = found["groups"][0]["runs"][0]["evaluations"]
    assert (list(evaluations), evaluations["final"]["validation/ce"]) == (["baseline", "final"], "inf")
    untrained, trained = found["lines"]
    assert (untrained["kind"], untrained["metrics"][ACCURACY]) == (
        "untrained", {"mean": 0.3, "half_width": None, "values": {"1": 0.3, "2": 0.3}}
    )  # fmt: skip
    assert trained["metrics"][ACCURACY]["half_width"] == pytest.approx(12.706205 * 0.05, rel=1e-6)
    assert trained["metrics"]["validation/ce"]["mean"] == "nan"


def test_the_command_prints_the_table_and_imports_nothing_heavy(tmp_path: Path) -> None:
    three(tmp_path, "a", [0.80, 0.82, 0.84])
    code = (
        "import sys; from forge.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, *[name for name in ('torch', 'transformers', 'datasets', 'scipy.stats') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "compare", "a1", "a2", "a3", "--output_root", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "0.8200 ± 0.0497" in done.stdout
    assert done.stdout.splitlines()[-1] == "0"


def test_a_missing_run_and_exclusive_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three(tmp_path, "first", [0.8])
    assert main(["compare", "frist1", "--output_root", str(tmp_path)]) == 2
    assert "did you mean first1?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["compare", "first1", "--json", "--markdown"])
    assert stop.value.code == 2


def test_a_real_run_has_every_key_of_the_written_ones(config_file: Path, tmp_path: Path) -> None:
    done = forge(
        "--config", config_file, "--run_name", "real", "--max_steps", "2", "--set", "checkpoint.every_steps=null"
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/**/real")
    real = RunDirectory(folder)
    report = {"step": 2, "rows_per_second": 64.0}
    numbers = {f"{split}/{name}": 0.5 for split in ("matched", "other") for name in ("ce", "accuracy", "macro_f1")}
    written = write_run(tmp_path / "written", numbers, baseline=numbers, reports=[report])

    assert differs_from(read(real.state_file), read(written.state_file)) == []
    known, made_up = read(real.metadata_file), read(written.metadata_file)
    (attempt,), (own,) = known.pop("attempts"), made_up.pop("attempts")
    assert differs_from(known, made_up) == []
    assert differs_from(attempt, own) == []
    real_tree, tree = (yaml.safe_load(run.config_file.read_text()) for run in (real, written))
    assert list(tree) == list(real_tree)
    assert tree["training"].keys() == real_tree["training"].keys()
    first, *steps, last = read_json_lines(real.metrics_file)
    own_first, own_step, own_last = read_json_lines(written.metrics_file)
    assert [differs_from(first, own_first), differs_from(steps[0], own_step), differs_from(last, own_last)] == [[]] * 3

    comparison = compare_runs([real])
    trained = line_of(comparison, "tiny")
    assert trained.cells["matched/accuracy"].values == {42: last["matched/accuracy"]}
    speeds = [row["rows_per_second"] for row in steps]
    assert trained.seconds_per_step is not None
    assert trained.seconds_per_step.mean == pytest.approx(sum(8 / speed for speed in speeds) / 2)
    assert as_json(comparison)["groups"][0]["runs"][0]["run_id"] == known["run_id"]
