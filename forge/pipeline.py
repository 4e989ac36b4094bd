"""A run on one page: from a checked config to a trained, exported and evaluated model."""

from contextlib import closing

from forge.attempt.attempt import Attempt
from forge.attempt.components import load_components
from forge.attempt.export import export
from forge.attempt.measured_memory import measured_memory
from forge.attempt.outcome import Result
from forge.attempt.request import Request
from forge.cluster.signals import StopRequest
from forge.ranks.world import join_ranks
from forge.run.log import RunLog
from forge.run.state import Stage
from forge.trainer.build import build_trainer
from forge.trainer.trainer import Trainer


def run_pipeline(request: Request, log: RunLog, stop: StopRequest) -> Result:
    """Run every stage that the run has not finished yet.

    Args:
        request: A config and a name for a new run, or the run to resume.
        log: On the console so far; the run's output.log is opened with the run.
        stop: What this process is asked by signals.

    Raises:
        UsageError: The request, the data or the models are wrong. Nothing of a new run was created.
        Stopped: A signal came. The run has a checkpoint of its last step, if it took one, and its state says where it
            stands; before the run exists, nothing was created.
        ForgeError: Anything else that ends a run with one sentence, which its state holds too.
    """
    ranks = join_ranks(request.config, stop)

    with Attempt.prepare(request, ranks) as attempt:  # resumed: locked, at a checkpoint; new: nothing on disk yet
        components = load_components(attempt.loaded, ranks, request.command)  # everything that bad input can break
        attempt.check(components)  # the same rows and weights as before, or the change is allowed
        attempt.open(log)  # directory, metadata, state, output.log

        with attempt.outcome_recorded(log), closing(build_trainer(components, attempt)) as trainer:
            trainer.restore(attempt.checkpoint)
            for stage in attempt.remaining_stages():
                attempt.enter(stage)  # stops here if any rank was asked to
                STAGES[stage](trainer, attempt)

            return attempt.complete()  # model card, registry, upload


def evaluate_baseline(trainer: Trainer, attempt: Attempt) -> None:
    """The teacher's metrics, and the student's before training."""
    trainer.evaluate_teacher()
    if attempt.config.evaluation.baseline:
        trainer.evaluate("baseline")


def train(trainer: Trainer, attempt: Attempt) -> None:
    """Train; record how much memory that took, and how much was predicted."""
    with measured_memory(attempt, trainer.weights.model, trainer.training):
        trainer.train()


def export_model(trainer: Trainer, attempt: Attempt) -> None:
    """Publish the trained model in final/."""
    export(attempt, trainer.weights, trainer.training)


def evaluate_final(trainer: Trainer, attempt: Attempt) -> None:
    """The student's metrics after training."""
    if attempt.config.evaluation.final:
        trainer.evaluate("final")


STAGES = {
    Stage.BASELINE_EVALUATION: evaluate_baseline,
    Stage.TRAINING: train,
    Stage.EXPORT: export_model,
    Stage.FINAL_EVALUATION: evaluate_final,
}
