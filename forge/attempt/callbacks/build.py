"""The callbacks that a config asks for, in the order in which they are called."""

from collections.abc import Sequence

from forge.attempt.callbacks.callback import Callback
from forge.attempt.callbacks.console import ConsoleReport
from forge.attempt.callbacks.metrics_file import MetricsFile
from forge.attempt.callbacks.peak import PeakMetrics
from forge.attempt.callbacks.samples import SamplesFolder
from forge.attempt.callbacks.wandb import WandbTracker
from forge.config.explain import effective
from forge.config.schema import Config
from forge.run.directory import RunDirectory
from forge.run.log import RunLog
from forge.run.metadata import read_metadata
from forge.run.state import TrainingState


def build_callbacks(
    config: Config, run: RunDirectory, state: TrainingState, log: RunLog, headline: Sequence[str]
) -> list[Callback]:
    """The callbacks of a run on rank 0; headline: the metrics whose best values the log reports at the end."""
    callbacks: list[Callback] = [MetricsFile(run), ConsoleReport(log.console), SamplesFolder(run)]
    callbacks.append(PeakMetrics(run, headline))  # after MetricsFile, whose rows it reads
    if config.tracking.wandb is not None:
        contents = {**effective(config), "run_metadata": read_metadata(run).model_dump(mode="json", exclude_unset=True)}
        callbacks.append(WandbTracker(config.tracking.wandb, run, state, contents))
    return callbacks
