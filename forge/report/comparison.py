"""Compares runs: means over seeds with intervals, next to the untrained model and the teacher, and the gap closed."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.config.former_names import current_headline, current_metric
from forge.errors import UsageError
from forge.report.estimate import Estimate, estimate
from forge.report.figures import RunFigures, gap_closed, read_figures, shown_metrics, splits_of
from forge.report.groups import Group, group_runs, only_distillation_differs
from forge.run.directory import RunDirectory
from forge.run.state import TrainingState

ROUNDING = 1e-5  # relative; more than sums in another order differ in float32, less than one more correct row


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    label: str
    kind: str  # untrained, trained, gap closed, teacher
    groups: tuple[int, ...]  # the indices of the groups that it is about
    cells: dict[str, Estimate]  # by metric; for `gap closed`, the ratio as the mean
    seconds_per_step: Estimate | None = None


@dataclass(frozen=True)
class PairedDifference:
    """left - right, seed by seed, so that what depends on the seed alone cancels out."""

    metric: str
    left: str
    right: str
    difference: Estimate


@dataclass(frozen=True)
class Comparison:
    """The table of `forge compare`, and what is printed after it."""

    groups: list[Group]
    metrics: list[str]
    lines: list[Line]
    paired: list[PairedDifference]
    legend: list[str]  # what the labels mean, if they are names of configs
    notes: list[str]


def compare_runs(runs: Sequence[RunDirectory], metrics: Sequence[str] = ()) -> Comparison:
    """Return the comparison of complete runs.

    Args:
        metrics: names, with or without the split; default: the headline metrics, agreement, kl and ece.

    Raises:
        UsageError: a run is not complete, two runs were evaluated on different rows, or a seed is repeated.
    """
    distinct = list({run.path.resolve(): run for run in runs}.values())
    _check_complete(distinct)
    figures = [read_figures(run) for run in distinct]
    _check_same_rows(figures)
    groups, legend = group_runs(figures)
    shown = _chosen(metrics, figures) if metrics else _shown(figures)
    trained = [_trained(number, group, shown) for number, group in enumerate(groups)]
    teachers = [_values([number], groups, "teacher", shown) for number in range(len(groups))]
    headline = [name for name in shown if name.split("/")[-1] in figures[0].headline]
    notes: list[str] = []
    lines = _reference_lines("untrained", "baseline", groups, shown)
    for number, line in enumerate(trained):
        lines.append(line)
        lines += _gap_line(number, groups, trained, teachers[number], headline, notes)
    lines += _reference_lines("teacher", "teacher", groups, shown)
    paired = _paired(groups, shown if metrics else headline)
    return Comparison(groups, shown, lines, paired, legend, [*notes, *_notes(groups, lines)])


def _check_complete(runs: Sequence[RunDirectory]) -> None:
    states = [(run, TrainingState.load(run.state_file)) for run in runs]
    unfinished = [
        f"{run.path} ({state.stage.replace('_', ' ')}, step {state.step}/{state.total_steps or '?'})"
        for run, state in states
        if not state.pipeline_complete
    ]
    if unfinished:
        raise UsageError(
            f"only complete runs can be compared; not complete: {', '.join(unfinished)}; continue with `forge resume "
            f"RUN`, or leave {'it' if len(unfinished) == 1 else 'them'} out"
        )


def _check_same_rows(figures: Sequence[RunFigures]) -> None:
    """Raise UsageError if the final numbers of two runs are about different rows, as far as their files show."""
    for run in figures:
        if "final" not in run.evaluations:
            raise UsageError(f"{run.run.path} has no final evaluation (evaluation.final is false); leave it out")
    first, *others = figures
    for run in others:
        for what, a, b in zip(
            ("task", "data fingerprint", "evaluation.max_rows", "splits", "evaluated rows"),
            _about(first),
            _about(run),
            strict=True,
        ):
            if a != b:
                raise UsageError(
                    f"{first.run.path} and {run.run.path} cannot be compared, since their numbers are about different "
                    f"rows: {what} {a} and {b}; compare runs on the same data with the same evaluation"
                )


def _about(run: RunFigures) -> tuple[str, ...]:
    """Return what shows which rows the final numbers are about, as text."""
    final = run.evaluations["final"]
    splits = splits_of(final)
    counts = [f"{split} {final[name]:g}" for split in splits if (name := f"{split}/rows") in final]
    return (
        run.metadata.task.type,
        run.metadata.data.fingerprint[:12],  # of rows and tokenizer
        str(run.config.get("evaluation.max_rows")).replace("None", "null"),
        ", ".join(sorted(splits)),
        ", ".join(sorted(counts)),
    )


def _shown(figures: Sequence[RunFigures]) -> list[str]:
    final = [run.evaluations["final"] for run in figures]
    return shown_metrics(final, figures[0].headline)


def _chosen(names: Sequence[str], figures: Sequence[RunFigures]) -> list[str]:
    known = list(dict.fromkeys(name for run in figures for name in run.evaluations["final"]))
    chosen: list[str] = []
    for name in dict.fromkeys(names):
        found = [metric for metric in known if name in (metric, metric.partition("/")[2])]
        if not found:
            short = dict.fromkeys([*known, *(metric.partition("/")[2] for metric in known)])
            near = [now for now in (current_metric(name), *current_headline([name])) if now in short]
            near += difflib.get_close_matches(name, short, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"--metric {name}: no final evaluation has it; {hint}")
        chosen += [metric for metric in found if metric not in chosen]
    return chosen


def _trained(number: int, group: Group, metrics: Sequence[str]) -> Line:
    times = {run.seed: run.seconds_per_step for run in group.runs if run.seconds_per_step is not None}
    cells = _estimates(_values([number], {number: group}, "final", metrics))
    return Line(group.label, "trained", (number,), cells, estimate(times) if times else None)


def _values(
    numbers: Sequence[int], groups: Mapping[int, Group] | Sequence[Group], stage: str, metrics: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Return the values by metric and seed; for each seed from the first group that has one."""
    found: dict[str, dict[int, float]] = {}
    for metric in metrics:
        for run in (run for number in numbers for run in groups[number].runs):
            if metric in run.evaluations.get(stage, {}):
                found.setdefault(metric, {}).setdefault(run.seed, run.evaluations[stage][metric])
    return found


def _estimates(values: Mapping[str, Mapping[int, float]]) -> dict[str, Estimate]:
    return {metric: estimate(by_seed) for metric, by_seed in values.items()}


def _reference_lines(kind: str, stage: str, groups: Sequence[Group], metrics: Sequence[str]) -> list[Line]:
    """Return one line for all groups whose numbers agree on their common seeds, else one per set of such groups."""
    sets: list[list[int]] = []
    for number in range(len(groups)):
        own = _values([number], groups, stage, metrics)
        if not own:
            continue
        same = (known for known in sets if _agree(own, _values(known, groups, stage, metrics)))
        if (known := next(same, None)) is not None:
            known.append(number)
        else:
            sets.append([number])
    lines = []
    for members in sets:
        label = kind if len(sets) == 1 else f"{kind}: {'; '.join(groups[number].label for number in members)}"
        values = _values(members, groups, stage, metrics)
        cells = {metric: _once_if_equal(estimate(by_seed)) for metric, by_seed in values.items()}
        lines.append(Line(label, kind, tuple(members), cells))
    return lines


def _agree(a: Mapping[str, Mapping[int, float]], b: Mapping[str, Mapping[int, float]]) -> bool:
    """True if the values are equal up to rounding on all common seeds; without common seeds, on all pairs of seeds."""
    pairs = []
    for metric in a.keys() & b.keys():
        common = a[metric].keys() & b[metric].keys()
        if common:
            pairs += [(a[metric][seed], b[metric][seed]) for seed in common]
        else:
            pairs += [(x, y) for x in a[metric].values() for y in b[metric].values()]
    return bool(pairs) and all(_close(x, y) for x, y in pairs)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=ROUNDING, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))


def _once_if_equal(known: Estimate) -> Estimate:
    """Return a single value without an interval if all seeds have the same, as for a model that was not trained."""
    first, *others = known.values.values()
    return known if not all(_close(first, value) for value in others) else Estimate(known.values, first, None)


def _gap_line(
    number: int,
    groups: Sequence[Group],
    trained: Sequence[Line],
    teacher: Mapping[str, Mapping[int, float]],
    headline: Sequence[str],
    notes: list[str],
) -> list[Line]:
    """Return the share of the gap between control and teacher that a distilled group has closed, from the means."""
    controls = [other for other, group in enumerate(groups) if group.alpha == 0]
    if groups[number].alpha == 0 or not controls or not teacher:
        return []
    twins = [other for other in controls if only_distillation_differs(groups[number], groups[other])]
    if len(twins) != 1 and len(controls) != 1:
        notes.append(f"gap closed of {groups[number].label}: no control differs from it only in the distillation")
        return []
    control = (twins or controls)[0]
    if not twins:
        notes.append(
            f"gap closed of {groups[number].label}: its control, {groups[control].label}, differs in more than "
            f"the distillation"
        )
    before, after = trained[control].cells, trained[number].cells
    cells = {}
    for metric in headline:
        if metric in before and metric in after and metric in teacher:
            share = gap_closed(metric, before[metric].mean, after[metric].mean, estimate(teacher[metric]).mean)
            if share is not None:
                cells[metric] = Estimate({}, share, None)
    return [Line("gap closed", "gap closed", (number, control), cells)]


def _paired(groups: Sequence[Group], metrics: Sequence[str]) -> list[PairedDifference]:
    """Return the differences of two groups if exactly two have common seeds.

    The difference is the distilled group minus the other; without distillation, the later minus the earlier.
    """
    sharing = [
        group for group in groups if any(set(group.seeds) & set(other.seeds) for other in groups if other is not group)
    ]
    if len(sharing) != 2:
        return []
    right, left = sharing
    if left.alpha == 0 < right.alpha:
        left, right = right, left
    found = []
    for metric in metrics:
        a, b = (_values([0], [group], "final", [metric]).get(metric, {}) for group in (left, right))
        common = sorted(a.keys() & b.keys())
        if common:
            difference = estimate({seed: a[seed] - b[seed] for seed in common})
            found.append(PairedDifference(metric, left.label, right.label, difference))
    return found


def _notes(groups: Sequence[Group], lines: Sequence[Line]) -> list[str]:
    """Return what a reader must know about the numbers, one sentence each."""
    notes = []
    seeds = [len(group.runs) for group in groups]
    if max(seeds) > 1:
        notes.append("±: half-width of the 95 % interval of the mean over the seeds (Student's t)")
    if min(seeds) == 1:
        which = "" if max(seeds) == 1 else f": {'; '.join(group.label for group in groups if len(group.runs) == 1)}"
        notes.append(f"one seed, so no interval{which}; a difference between single runs may be chance")
    final = groups[0].runs[0].evaluations["final"]
    sampled = [
        f"{final[f'{split}/rows']:g} of {final[f'{split}/rows_of']:g} rows of {split}"
        for split in splits_of(final)
        if f"{split}/rows_of" in final
    ]
    if sampled:
        notes.append(f"evaluated on {', '.join(sampled)}, sampled by each run with its seed (evaluation.max_rows)")
    for group, line in zip(groups, (line for line in lines if line.kind == "trained"), strict=True):
        fewer = [name for name, cell in line.cells.items() if cell.seeds < len(group.runs)]
        if fewer:
            notes.append(f"{group.label}: some seeds lack {', '.join(fewer)}")
        places = {(run.metadata.world.device, run.metadata.world.ranks) for run in group.runs}
        if len(places) > 1:
            notes.append(f"{group.label}: the time per step is from runs on different devices or numbers of ranks")
    if any(line.kind == "gap closed" for line in lines):
        notes.append(
            "gap closed: (distilled - control) / (teacher - control), from the means; - if the teacher is not better "
            "than the control"
        )
    return notes


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as JSON: the numbers of the table, and those of every seed. Non-finite numbers are text."""
    return {
        "metrics": comparison.metrics,
        "groups": [
            {
                "label": group.label,
                "differs": group.differs,
                "config": str(group.runs[0].config_name),
                "seeds": group.seeds,
                "runs": [
                    {
                        "path": str(run.run.path),
                        "run_id": run.state.run_id,
                        "seed": run.seed,
                        "git_commit": run.metadata.attempts[-1].git.commit,
                        "seconds_per_step": _plain(run.seconds_per_step),
                        "evaluations": {
                            stage: {name: _plain(value) for name, value in numbers.items()}
                            for stage, numbers in run.evaluations.items()
                            if stage != "training"
                        },
                    }
                    for run in group.runs
                ],
            }
            for group in comparison.groups
        ],
        "lines": [
            {
                "label": line.label,
                "kind": line.kind,
                "groups": [comparison.groups[number].label for number in line.groups],
                "metrics": {name: _estimate_json(cell) for name, cell in line.cells.items()},
                "seconds_per_step": None if line.seconds_per_step is None else _estimate_json(line.seconds_per_step),
            }
            for line in comparison.lines
        ],
        "paired": [
            {"metric": item.metric, "left": item.left, "right": item.right, **_estimate_json(item.difference)}
            for item in comparison.paired
        ],
        "notes": comparison.notes,
    }


def _estimate_json(known: Estimate) -> dict[str, Any]:
    return {
        "mean": _plain(known.mean),
        "half_width": known.half_width,
        "values": {str(seed): _plain(value) for seed, value in known.values.items()},
    }


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
