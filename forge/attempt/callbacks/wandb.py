"""Sends a run's config, metadata and metrics to Weights & Biases; no failure there stops training."""

import io
import logging
from collections.abc import Callable
from typing import Any

from forge.attempt.callbacks.callback import Callback, Metrics, Samples
from forge.attempt.callbacks.peak import read_peaks
from forge.config.schema import WandbConfig
from forge.run.directory import RunDirectory
from forge.run.state import TrainingState
from forge.task.task import Sample

logger = logging.getLogger(__name__)


class WandbTracker(Callback):
    """One W&B run for each forge run, with the forge run's id."""

    def __init__(self, config: WandbConfig, run: RunDirectory, state: TrainingState, contents: dict[str, Any]):
        """contents: the run's config and metadata, shown as the W&B run's config."""
        self._run: Any = None
        self._folder = run
        self._guarded(lambda: self._start(config, run, state, contents))

    def reported(self, state: TrainingState, metrics: Metrics) -> None:
        self._log(state.step, {f"train/{name}": value for name, value in metrics.items()})

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        self._log(state.step, {f"{stage}/{name}": value for name, value in metrics.items()})
        if self._run is not None and stage != "training":
            self._guarded(lambda: self._run.summary.update({f"{stage}/{n}": value for n, value in metrics.items()}))

    def sampled(self, state: TrainingState, stage: str, samples: Samples) -> None:
        if self._run is not None:
            self._guarded(
                lambda: self._log(state.step, {f"{stage}/{split}/samples": _table(samples[split]) for split in samples})
            )

    def saved(self, state: TrainingState, facts: Metrics) -> None:
        self._log(state.step, {f"checkpoint/{name}": facts[name] for name in ("mib", "seconds", "stall_seconds")})

    def finished(self, state: TrainingState) -> None:
        if self._run is not None:
            best = {f"peak/{name}": peak["value"] for name, peak in read_peaks(self._folder).items()}
            self._guarded(lambda: self._run.summary.update(best))
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=0 if state.pipeline_complete else 1))

    def _start(self, config: WandbConfig, run: RunDirectory, state: TrainingState, contents: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            mode=config.mode,
            name=run.name,
            id=state.run_id,
            resume="allow",
            dir=str(run.path),
            config=contents,
            # forge keeps the console in output.log, and nobody is there to answer a login prompt
            settings=wandb.Settings(console="off", init_timeout=60, login_timeout=20, silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        logger.info("W&B %s: %s", config.mode, self._run.url if config.mode == "online" else self._run.dir)

    def _log(self, step: int, metrics: Metrics) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.log({"step": step, **metrics}))

    def _guarded(self, send: Callable[[], Any]) -> None:
        try:
            send()
        except Exception as error:  # noqa: BLE001 - a tracker has a hundred ways to fail, and none may stop training
            self._run = None
            reason = " ".join(str(error).split())[:300]
            logger.warning("W&B failed and is off for the rest of this run (%s: %s)", type(error).__name__, reason)


def _table(samples: list[Sample]) -> Any:
    import wandb
    from PIL import Image

    def image(sample: Sample) -> Any:
        return None if sample.image is None else wandb.Image(Image.open(io.BytesIO(sample.image)))

    rows = [[sample.row, image(sample), sample.prompt, sample.prediction, sample.reference] for sample in samples]
    return wandb.Table(columns=["row", "image", "prompt", "prediction", "reference"], data=rows)
