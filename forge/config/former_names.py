"""Former names of config keys and metrics: refused in a user's config, translated in the files of an older run.

A run that an earlier version started has the former names in config.yaml, in its checkpoints' manifests, in
run_metadata.json and in metrics.jsonl. Whatever reads one of these files calls a function of this module, and the rest
of forge knows only the current names.
"""

from collections.abc import Iterable, Mapping
from typing import Any

KEYS = {
    "evaluation.max_samples": "evaluation.max_rows",
    "evaluation.samples": "evaluation.shown_texts",
}
METRICS = {  # of a whole name, or of what follows the split in `split/metric`
    "samples_per_second": "rows_per_second",
}
SPLIT_METRICS = {
    "loss": "ce",  # a report of training keeps its `loss`: it has no split
    "samples": "rows",
    "samples_of": "rows_of",
}
METRIC_KEYS = ("checkpoint.best_metric",)  # config keys whose value is the name of a metric


def current_key(key: str) -> str:
    """Return the current name of a dotted config key."""
    return KEYS.get(key, key)


def current_metric(name: str) -> str:
    """Return the current name of a metric, such as `validation/rows` for `validation/samples`."""
    split, slash, metric = name.partition("/")  # a label, as in `validation/correct/loss`, is not a metric
    return f"{split}/{SPLIT_METRICS.get(metric, metric)}" if slash else METRICS.get(name, name)


def current_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping by dotted config key with the current names."""
    return {current_key(key): value for key, value in values.items()}


def current_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl, or any mapping by metric, with the current names."""
    return {current_metric(name): value for name, value in row.items()}


def current_config(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return a recorded config, a tree of maps, with the current names of keys and of the metrics in it."""
    current = {}
    for name, value in tree.items():
        key = current_key(f"{path}{name}")
        if isinstance(value, Mapping):
            value = current_config(value, f"{path}{name}.")
        elif key in METRIC_KEYS and isinstance(value, str):
            value = current_metric(value)
        current[key.removeprefix(path)] = value
    return current


def current_headline(names: Iterable[str]) -> list[str]:
    """Return the current names of headline metrics, which have no split."""
    return [SPLIT_METRICS.get(name, name) for name in names]
