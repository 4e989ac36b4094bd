"""Sends a run's config, metadata and metrics to Weights & Biases; no failure there stops training."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.attempt.callbacks.callback import Callback, Metrics, Samples
from forge.attempt.callbacks.peak import read_peaks
from forge.attempt.callbacks.wandb_file import logged_steps
from forge.config.schema import WandbConfig
from forge.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED
from forge.run.directory import RunDirectory
from forge.run.metrics import read_metrics
from forge.run.state import TrainingState
from forge.task.task import Sample

logger = logging.getLogger(__name__)


class WandbTracker(Callback):
    """One W&B run for each forge run, with the forge run's id; each step once, however often the run was resumed.

    The student's evaluations are one curve, eval/SPLIT/METRIC, from the untrained model at step 0 to the final one.
    """

    def __init__(self, config: WandbConfig, run: RunDirectory, state: TrainingState, contents: dict[str, Any]):
        """contents: the run's config and metadata, shown as the W&B run's config."""
        self._run: Any = None
        self._folder = run
        self._logged: set[tuple[str, int]] = set()
        self._preemptions = state.preemptions
        self._guarded(lambda: self._start(config, run, state, contents))

    def reported(self, state: TrainingState, metrics: Metrics) -> None:
        self._log("train", state, metrics)

    def evaluated(self, state: TrainingState, stage: str, metrics: Metrics) -> None:
        self._log(_kind(stage), state, metrics)

    def sampled(self, state: TrainingState, stage: str, samples: Samples) -> None:
        if self._run is not None:
            self._guarded(lambda: self._log("samples", state, {split: _table(samples[split]) for split in samples}))

    def saved(self, state: TrainingState, facts: Metrics) -> None:
        self._log("checkpoint", state, {name: facts[name] for name in ("mib", "seconds", "stall_seconds")})

    def finished(self, state: TrainingState) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(self._summary()))
        stopped = state.preemptions > self._preemptions
        if self._run is not None and stopped:
            self._guarded(lambda: self._run.mark_preempting())
        code = EXIT_COMPLETE if state.pipeline_complete else EXIT_STOPPED if stopped else EXIT_FAILED
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=code))

    def _start(self, config: WandbConfig, run: RunDirectory, state: TrainingState, contents: dict[str, Any]) -> None:
        import wandb

        self._logged = logged_steps(run.path / "wandb")
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
        folder = Path(self._run.dir).parent
        logger.info("W&B %s", self._run.url if config.mode == "online" else f"offline: later `wandb sync {folder}`")

    def _summary(self) -> Metrics:
        """The last values of the whole run, of which this attempt may have logged only a part; and the best ones."""
        found: Metrics = {}
        for row in read_metrics(self._folder.metrics_file):
            kind = _kind(row["stage"]) if "stage" in row else "train"
            found |= {f"{kind}/{name}": value for name, value in row.items() if name not in ("step", "epoch", "stage")}
        return found | {f"peak/{name}": peak["value"] for name, peak in read_peaks(self._folder).items()}

    def _log(self, kind: str, state: TrainingState, metrics: Metrics) -> None:
        """Log what is of one kind, unless an attempt before has logged it at that step."""
        if self._run is None or (kind, state.step) in self._logged:
            return
        named = {f"{kind}/{name}": value for name, value in metrics.items()}
        self._guarded(lambda: self._run.log({"step": state.step, "epoch": round(state.epoch, 4), **named}))

    def _guarded(self, send: Callable[[], Any]) -> None:
        try:
            send()
        except Exception as error:  # noqa: BLE001 - a tracker has a hundred ways to fail, and none may stop training
            self._run = None
            reason = " ".join(str(error).split())[:300]
            logger.warning("W&B failed and is off for the rest of this run (%s: %s)", type(error).__name__, reason)


def _kind(stage: str) -> str:
    """The first part of an evaluation's names: of the student or of the teacher."""
    return "teacher" if stage == "teacher" else "eval"


def _table(samples: list[Sample]) -> Any:
    import wandb
    from PIL import Image

    def image(sample: Sample) -> Any:
        return None if sample.image is None else wandb.Image(Image.open(io.BytesIO(sample.image)))

    rows = [[sample.row, image(sample), sample.prompt, sample.prediction, sample.reference] for sample in samples]
    return wandb.Table(columns=["row", "image", "prompt", "prediction", "reference"], data=rows)
