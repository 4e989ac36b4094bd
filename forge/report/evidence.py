"""Summarises what training achieved: untrained, SFT, KD and teacher side by side, and the share of the gap closed."""

from dataclasses import dataclass

from forge.report.figures import gap_closed, read_config, read_evaluations, shown_metrics
from forge.report.table import ABSENT, markdown, number
from forge.run.directory import RunDirectory
from forge.run.metadata import read_metadata

UNTRAINED, SFT, KD, TEACHER = "untrained", "SFT", "KD", "teacher"
GAP_CLOSED = "gap closed"


@dataclass(frozen=True)
class Evidence:
    """The evaluations of one run, and of its control; numbers of one seed, so without intervals."""

    evaluations: dict[str, dict[str, float]]  # by model (untrained, SFT, KD, teacher, in this order), then by metric
    metrics: list[str]  # each split's headline metrics, agreement, kl and ece; then each split's number of rows
    gap_closed: dict[str, float]  # by headline metric, if there is a gap to close
    sampled: bool  # evaluated on a sample of the rows

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows as text, one metric per row, with `-` for a missing number."""
        header = ["metric", *self.evaluations, *([GAP_CLOSED] if self.gap_closed else [])]
        rows = []
        for metric in self.metrics:
            values = [numbers.get(metric) for numbers in self.evaluations.values()]
            cells = [ABSENT if value is None else _text(value) for value in values]
            share = self.gap_closed.get(metric)
            gap = [ABSENT if share is None else f"{100 * share:.0f} %"] if self.gap_closed else []
            rows.append([metric, *cells, *gap])
        return header, rows

    @property
    def text(self) -> str:
        """The notes that follow the table, one per line; may be empty."""
        lines = []
        if self.gap_closed:
            lines.append("gap closed: the share of the way from SFT to the teacher; one seed, no interval")
        if self.sampled:
            lines.append("evaluated on a sample of the rows (evaluation.max_rows), not on all of them")
        return "\n".join(lines)


def evidence(run: RunDirectory, control: RunDirectory | None = None) -> Evidence:
    """Read the evaluations that a run's files hold. The run need not be complete, and any evaluation may be missing.

    Args:
        control: the twin of a distilled run with alpha = 0, whose final numbers are those of SFT.

    Raises:
        UsageError: a file is missing or broken.
    """
    own = read_evaluations(run)
    trained = KD if float(read_config(run).get("distillation.alpha", 0.0)) > 0 else SFT
    found = {UNTRAINED: own.get("baseline"), trained: own.get("final"), TEACHER: own.get("teacher")}
    if control is not None:
        found[SFT] = read_evaluations(control).get("final")
    evaluations = {name: numbers for name in (UNTRAINED, SFT, KD, TEACHER) if (numbers := found.get(name))}
    headline = read_metadata(run).task.headline
    metrics = shown_metrics(list(evaluations.values()), headline)
    # Without a control there is no gap: what the task itself teaches would count as the teacher's.
    compared = (SFT, trained, TEACHER) if control is not None else ()
    gaps = _gaps(metrics, headline, *(evaluations.get(name) for name in compared)) if compared else {}
    names = dict.fromkeys(name for numbers in evaluations.values() for name in numbers)
    return Evidence(
        evaluations,
        [*metrics, *(name for name in names if name.endswith("/rows"))],
        gaps,
        any(name.endswith("/rows_of") for name in names),
    )


def evidence_markdown(known: Evidence) -> str:
    """Return the table and its notes in GitHub's Markdown, for a model card; empty if nothing was evaluated."""
    if not known.evaluations:
        return ""
    header, rows = known.table()
    notes = "".join(f"\n\n{line[0].upper()}{line[1:]}." for line in known.text.splitlines())
    return markdown(["", *header[1:]], rows) + notes


def _gaps(
    metrics: list[str],
    headline: list[str],
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    teacher: dict[str, float] | None,
) -> dict[str, float]:
    if before is None or after is None or teacher is None:
        return {}
    gaps = {}
    for metric in metrics:
        if metric.split("/")[-1] in headline and all(metric in numbers for numbers in (before, after, teacher)):
            share = gap_closed(metric, before[metric], after[metric], teacher[metric])
            if share is not None:
                gaps[metric] = share
    return gaps


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)
