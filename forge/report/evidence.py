"""Says what a run's training brought: untrained, SFT, KD and teacher side by side, and the share of the gap closed."""

from dataclasses import dataclass

from forge.report.figures import gap_closed, read_config, read_evaluations, shown_metrics
from forge.report.table import ABSENT, markdown, number
from forge.run.directory import RunDirectory
from forge.run.metadata import read_metadata

UNTRAINED, SFT, KD, TEACHER = "untrained", "SFT", "KD", "teacher"
GAP_CLOSED = "gap closed"


@dataclass(frozen=True)
class Evidence:
    """Numbers of one seed: they carry no interval."""

    rows: dict[str, dict[str, float]]  # by what was evaluated, in the order untrained, SFT, KD, teacher: by metric
    metrics: list[str]  # the headline of every split, agreement, kl and ece; then the rows evaluated of each split
    gap_closed: dict[str, float]  # by headline metric; without those that leave no gap to close
    against: str | None  # the row that the gap is measured from: SFT with a control, else untrained; None: no gap
    sampled: bool  # evaluated on a sample of the rows

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text: a metric to a row, `-` where there is no number."""
        header = ["metric", *self.rows, *([GAP_CLOSED] if self.gap_closed else [])]
        rows = []
        for metric in self.metrics:
            values = [numbers.get(metric) for numbers in self.rows.values()]
            cells = [ABSENT if value is None else _text(value) for value in values]
            share = self.gap_closed.get(metric)
            gap = [ABSENT if share is None else f"{100 * share:.0f} %"] if self.gap_closed else []
            rows.append([metric, *cells, *gap])
        return header, rows

    @property
    def text(self) -> str:
        """What stands below the table; empty where there is nothing to say."""
        lines = []
        if self.gap_closed:
            lines.append(f"gap closed: the share of the way from {self.against} to the teacher; one seed, no interval")
        if self.sampled:
            lines.append("evaluated on a sample of the rows (evaluation.max_samples), not on all of them")
        return "\n".join(lines)


def evidence(run: RunDirectory, control: RunDirectory | None = None) -> Evidence:
    """The evaluations that the runs' files hold; a run need not be complete, and none need have been made.

    control: the alpha = 0 twin of a distilled run, whose final numbers are SFT's. Raises UsageError, naming the file,
    where one is missing or broken.
    """
    own = read_evaluations(run)
    trained = KD if float(read_config(run).get("distillation.alpha", 0.0)) > 0 else SFT
    found = {UNTRAINED: own.get("baseline"), trained: own.get("final"), TEACHER: own.get("teacher")}
    if control is not None:
        found[SFT] = read_evaluations(control).get("final")
    rows = {name: numbers for name in (UNTRAINED, SFT, KD, TEACHER) if (numbers := found.get(name))}
    headline = read_metadata(run).task.headline
    metrics = shown_metrics(list(rows.values()), [*headline])
    against = SFT if control is not None else UNTRAINED
    gaps = _gaps(metrics, headline, rows.get(against), rows.get(trained), rows.get(TEACHER))
    return Evidence(
        rows,
        [*metrics, *(name for name in _known(rows) if name.endswith("/samples"))],
        gaps,
        against if gaps else None,
        any(name.endswith("/samples_of") for name in _known(rows)),
    )


def evidence_markdown(known: Evidence) -> str:
    """A table of GitHub's Markdown and what stands below it, for a model card; empty where nothing was evaluated."""
    if not known.rows:
        return ""
    header, rows = known.table()
    below = "".join(f"\n\n{line[0].upper()}{line[1:]}." for line in known.text.splitlines())
    return markdown(["", *header[1:]], rows) + below


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


def _known(rows: dict[str, dict[str, float]]) -> dict[str, None]:
    return {name: None for numbers in rows.values() for name in numbers}


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)
