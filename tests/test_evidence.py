"""What a run's training brought is read from its files, whichever evaluations were made."""

from pathlib import Path

import pytest
from recorded_runs import of, write_run

from forge.errors import UsageError
from forge.report.evidence import evidence, evidence_markdown
from forge.report.figures import read_figures

KD = {"distillation.alpha": 0.9}
BEFORE = of(ce=1.1, accuracy=0.30, agreement=0.25, kl=0.9)
AFTER = of(ce=0.45, accuracy=0.84, agreement=0.92, kl=0.05)
TEACHER = of(ce=0.25, accuracy=0.90)


def test_an_older_run_is_read_with_the_names_of_today(tmp_path: Path) -> None:
    former = {"validation/loss": 1.1, "validation/accuracy": 0.3, "validation/correct/loss": 7}
    run = write_run(tmp_path / "kd", of(loss=0.5, accuracy=0.8), baseline=former, headline=["loss", "accuracy"])
    found = evidence(run)
    assert found.evaluations["untrained"] == {
        "validation/ce": 1.1,
        "validation/accuracy": 0.3,
        "validation/correct/loss": 7,
    }
    assert found.evaluations["SFT"]["validation/ce"] == 0.5
    assert found.metrics[:2] == ["validation/ce", "validation/accuracy"]
    figures = read_figures(run)
    assert figures.headline == ["ce", "accuracy"]
    assert figures.evaluations["final"]["validation/ce"] == 0.5


def test_a_distilled_run_is_shown_with_its_control_and_its_teacher(tmp_path: Path) -> None:
    run = write_run(tmp_path / "kd", AFTER, baseline=BEFORE, teacher=TEACHER, settings=KD)
    control = write_run(tmp_path / "sft", of(ce=0.50, accuracy=0.82), baseline=of(ce=9.9, accuracy=0.1))
    found = evidence(run, control)
    assert list(found.evaluations) == ["untrained", "SFT", "KD", "teacher"]
    assert [found.evaluations[name]["validation/accuracy"] for name in found.evaluations] == [0.30, 0.82, 0.84, 0.90]
    # ce (0.45 - 0.50) / (0.25 - 0.50); accuracy (0.84 - 0.82) / (0.90 - 0.82)
    assert found.gap_closed == pytest.approx({"validation/ce": 0.2, "validation/accuracy": 0.25})
    assert found.table() == (
        ["metric", "untrained", "SFT", "KD", "teacher", "gap closed"],
        [
            ["validation/ce", "1.1000", "0.5000", "0.4500", "0.2500", "20 %"],
            ["validation/accuracy", "0.3000", "0.8200", "0.8400", "0.9000", "25 %"],
            ["validation/agreement", "0.2500", "-", "0.9200", "-", "-"],
            ["validation/kl", "0.9000", "-", "0.0500", "-", "-"],
            ["validation/rows", "1,000", "1,000", "1,000", "1,000", "-"],
        ],
    )


def test_without_a_control_there_is_no_gap(tmp_path: Path) -> None:
    """From the untrained student it would count as the teacher's what the task itself teaches: 265 % was seen."""
    found = evidence(write_run(tmp_path / "kd", AFTER, baseline=BEFORE, teacher=TEACHER, settings=KD), None)
    assert list(found.evaluations) == ["untrained", "KD", "teacher"]
    assert (found.gap_closed, found.text) == ({}, "")
    assert found.table()[0] == ["metric", "untrained", "KD", "teacher"]


def test_a_control_without_final_numbers_leaves_no_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "kd", AFTER, baseline=BEFORE, teacher=TEACHER, settings=KD)
    found = evidence(run, write_run(tmp_path / "sft"))
    assert (list(found.evaluations), found.gap_closed) == (["untrained", "KD", "teacher"], {})


def test_fine_tuning_has_only_before_and_after(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sft", of(ce=0.5, accuracy=0.82, ece=0.04), baseline=of(ce=1.1, accuracy=0.3, ece=0.2))
    found = evidence(run, None)
    assert (found.gap_closed, found.text) == ({}, "")
    assert (
        evidence_markdown(found)
        == """\
|  | untrained | SFT |
| --- | --- | --- |
| validation/ce | 1.1000 | 0.5000 |
| validation/accuracy | 0.3000 | 0.8200 |
| validation/ece | 0.2000 | 0.0400 |
| validation/rows | 1,000 | 1,000 |"""
    )


def test_fine_tuning_with_its_teacher_evaluated_has_no_gap(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "sft",
        of(accuracy=0.6, ece=0.3),
        baseline=of(accuracy=0.3, ece=0.5),
        teacher=of(accuracy=0.9, ece=0.1),
    )
    found = evidence(run, None)
    assert list(found.evaluations) == ["untrained", "SFT", "teacher"]
    assert found.gap_closed == {}  # a teacher that taught nothing


def test_markdown_explains_the_gap_and_the_sampled_rows(tmp_path: Path) -> None:
    sampled = [of(accuracy=value, rows=50, rows_of=1000) for value in (0.3, 0.84, 0.9)]
    run = write_run(tmp_path / "kd", sampled[1], baseline=sampled[0], teacher=sampled[2], settings=KD)
    control = write_run(tmp_path / "sft", of(accuracy=0.8, rows=50, rows_of=1000))
    text = evidence_markdown(evidence(run, control))
    assert text.startswith("|  | untrained | SFT | KD | teacher | gap closed |\n")
    assert text.endswith(
        "| validation/rows | 50 | 50 | 50 | 50 | - |\n\n"
        "Gap closed: the share of the way from SFT to the teacher; one seed, no interval.\n\n"
        "Evaluated on a sample of the rows (evaluation.max_rows), not on all of them."
    )


def test_a_run_that_was_never_evaluated_has_nothing_to_show(tmp_path: Path) -> None:
    found = evidence(write_run(tmp_path / "a"))
    assert (found.evaluations, found.metrics, evidence_markdown(found)) == ({}, [], "")


def test_large_and_broken_numbers_stay_readable(tmp_path: Path) -> None:
    final = of(ce="nan", perplexity=1234.5, cer=25.031)
    found = evidence(write_run(tmp_path / "a", final, headline=["ce", "perplexity", "cer"]))
    assert [row[1] for row in found.table()[1]] == ["nan", "1234", "25.03", "1,000"]


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", AFTER)
    run.config_file.unlink()
    with pytest.raises(UsageError, match=r"a/config\.yaml cannot be read"):
        evidence(run)
