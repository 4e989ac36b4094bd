"""Former names of config keys and metrics: refused in a user's config, translated in the files of an older run."""

from collections.abc import Iterable, Mapping
from typing import Any

SPLIT_METRICS = {  # of what follows the split in `split/metric`
    "loss": "ce",  # a report of training keeps its `loss`: it has no split
}


def current_metric(name: str) -> str:
    """Return the current name of a metric, such as `validation/ce` for `validation/loss`."""
    split, slash, metric = name.partition("/")  # a label, as in `validation/correct/loss`, is no metric
    return f"{split}/{SPLIT_METRICS.get(metric, metric)}" if slash else name


def current_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl, or any mapping by metric, with the current names."""
    return {current_metric(name): value for name, value in row.items()}


def current_headline(names: Iterable[str]) -> list[str]:
    """Return the current names of headline metrics, which have no split."""
    return [SPLIT_METRICS.get(name, name) for name in names]
