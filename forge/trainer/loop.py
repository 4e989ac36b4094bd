"""The loop over Accelerate: steps, rate, reports, evaluations, checkpoints and stops; by itself it fine-tunes."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.attempt.callbacks.callback import Callback
from forge.checkpoint.commit import Checkpoints, RunFacts, Saved
from forge.checkpoint.contents import Training, restore
from forge.checkpoint.shards import Named
from forge.cluster.signals import StopRequest, in_loader_worker
from forge.config.explain import effective
from forge.config.placing import located
from forge.config.schema import Config, LossConfig, TrainingConfig
from forge.data.batches import FILLER, Batch, preparing
from forge.data.stream import step_batches
from forge.errors import Stopped, TrainingError, UsageError
from forge.losses.cross_entropy import count_labels
from forge.model.head import LinearHead, find_head
from forge.model.layers import compile_layers
from forge.model.load import LoadedModel
from forge.model.trained import trained_weights
from forge.ranks.accelerator import rank_seed
from forge.ranks.agreement import on_rank_0
from forge.ranks.deepspeed import clip_grad_norm, device_to_build_on, plans_of, prepare, weights_to_round
from forge.ranks.partitions import Partitions
from forge.ranks.stop_vote import StopVote
from forge.report.figures import LOWER_IS_BETTER
from forge.run.directory import RunDirectory
from forge.run.lock import RunLock
from forge.run.provenance import code_facts
from forge.run.state import BestMetric, Stage, TrainingState
from forge.student.evaluation import evaluate
from forge.student.objective import Objective
from forge.student.student import Student
from forge.task.task import Task
from forge.teacher.teacher import TeacherOutputs
from forge.trainer.meter import StepMeter
from forge.trainer.optimizer import build_optimizer, learning_rate

logger = logging.getLogger(__name__)


class FinetuningTrainer:
    """Trains a model with cross-entropy on the task's labels.

    The loss of an optimizer step is the mean over all labels of the step: every label weighs the same, whatever
    the rank or the micro-batch that it came in. So one device with eight micro-batches, eight devices with one,
    and one large batch take the same step.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        task: Task,
        loaded: LoadedModel,
        run: RunDirectory,
        state: TrainingState,
        callbacks: Callback,
        lock: RunLock,
        stop: StopRequest,
    ):
        """lock: taken by rank 0; stop: what this process is asked by signals."""
        self.config, self.accelerator, self.task = config, accelerator, task
        self.run, self.state, self.callbacks, self.lock = run, state, callbacks, lock
        training = config.training

        self.rows_per_step, self.micro_batches = training.step_shape(accelerator.num_processes)
        # accelerator.backward divides by the micro-batches and DDP by the ranks; the loss is already divided by the
        # labels of the whole step, so both are taken back.
        self.undo_averaging = self.micro_batches * accelerator.num_processes
        accelerator.gradient_accumulation_steps = self.micro_batches

        self.num_workers = task.num_workers if training.num_workers is None else training.num_workers
        model = loaded.model
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        cast(nn.Module, model).to(device_to_build_on(accelerator))
        self.model = model  # the bare one, for export
        if training.compile:
            compile_layers(model)
        student = self.build_student(model)
        self.weights = trained_weights(model, loaded.below)
        optimizer = build_optimizer(student, training)
        named = Named.of(self.weights.tensors(), model, student.projections, optimizer)
        originals = weights_to_round(accelerator, named.trained.values())
        self.student, self.optimizer = prepare(accelerator, student, optimizer)
        partitions = Partitions(self.optimizer) if plans_of(accelerator) else None
        if partitions is not None:
            partitions.set_weights(originals)
        del originals
        # From here on every rank draws its own dropout.
        torch.manual_seed(rank_seed(training.seed, accelerator.process_index))

        self.batches = step_batches(
            task.train,
            task.collate,
            rows_per_step=self.rows_per_step,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            micro_batches=self.micro_batches,
            seed=training.seed,
            group_by_length=training.length_grouping,
            num_workers=self.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            worker_init=in_loader_worker,
        )
        state.step_sizes = self.batches.step_sizes
        self._note_total()
        self.meter = StepMeter(accelerator)
        self.vote = StopVote(accelerator, stop)
        self.parts = Training(
            accelerator,
            self.weights,
            self.optimizer,
            training.seed,
            student.projections,
            named,
            partitions,
        )
        facts = RunFacts(
            ranks=accelerator.num_processes,
            rows_per_step=self.rows_per_step,
            mixed_precision=accelerator.mixed_precision,
            config=effective(located(config)),
            data_fingerprint=task.fingerprint,
            **code_facts(),
        )
        self.checkpoints = Checkpoints(run, lock, self.parts, config.checkpoint, facts, self._told_of_save)

    def restore(self, checkpoint: Path | None) -> None:
        """Goes back to a verified checkpoint; a run without one starts at its beginning."""
        state = self.state
        progress = None
        if checkpoint is None:  # whatever steps an attempt took, nothing holds their weights
            state.step, state.epoch, state.samples, state.tokens, state.evaluated_step = 0, 0.0, 0, 0, 0
            state.best_metric, state.kept_best, state.step_sizes = None, None, self.batches.step_sizes
        else:
            saved, progress = restore(self.parts, checkpoint)
            state.step, state.tokens = saved.step, saved.tokens
            state.evaluated_step, state.best_metric = saved.evaluated_step, saved.best_metric
            state.kept_best = saved.kept_best
            state.latest_checkpoint = checkpoint.name
            self.batches.adopt(state.step, saved.step_sizes)
            state.step_sizes = self.batches.step_sizes
        self._note_total()
        self._note_position()
        self.meter.restart(progress)
        if state.step > self.total_steps:
            logger.warning("%d steps are asked for, and %d are taken already", self.total_steps, state.step)
        if state.step < self.total_steps and state.reached(Stage.EXPORT):
            state.stage = Stage.TRAINING  # the checkpoints of later steps are lost, and what was made of them outdated

    def train(self) -> None:
        """Runs from the state's step to the last one.

        Raises TrainingError at a loss that is not finite, and Stopped, with a checkpoint committed, at a signal.
        """
        state, config = self.state, self.config
        self.batches.start_at(state.step)
        self.student.train()
        self._on_rank_0_of_this_attempt(lambda: self.callbacks.training_started(state))
        with self.meter.paused():
            self._make_up_for_evaluation()
        while state.step < self.total_steps:
            rate = learning_rate(state.step, self.total_steps, config.training)
            with preparing(f"step {state.step + 1} of {self.total_steps}"):
                micro_batches = self.batches.next_step()
            self.train_step(micro_batches, rate)
            state.step += 1
            self.callbacks.stepped(state)
            last = state.step == self.total_steps
            saves = due(state.step, config.checkpoint.every_steps)
            saves = saves or (last and config.checkpoint.every_steps is not None)
            if last or due(state.step, config.logging.every_steps):
                self._report(rate)
            if self._evaluation_due():
                with self.meter.paused():
                    saves = self._evaluate_in_training() or saves
            stop, written = self.vote.cast(self.checkpoints.written)
            with self.meter.paused():
                if stop:
                    self._save_and_stop()
                if written:
                    self.checkpoints.finish(state)
                if saves:
                    self._save()
        self.batches.close()
        self.checkpoints.finish(state)
        self.callbacks.training_ended(state)

    def close(self) -> None:
        """However training ended: no process and no thread of it is left, and no half-written checkpoint."""
        self.batches.close()
        self.checkpoints.abandon()

    def train_step(self, micro_batches: list[Batch], rate: float) -> None:
        """One optimizer update at the given rate.

        Nothing here waits for the device, but for fp16's scaler, DeepSpeed's look at the norm, and transformers' own
        look at masks and at packed positions.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels = sum(int(count_labels(batch["labels"])) for batch in micro_batches)  # still on the CPU
        counts = {
            "rows": sum(int((batch["ids"] != FILLER).sum()) for batch in micro_batches),
            "tokens": sum(int(batch["tokens"]) for batch in micro_batches),
            "truncated": sum(int(batch["truncated"]) for batch in micro_batches if "truncated" in batch),
        }
        # torch.full and not torch.tensor: a copy from the CPU would wait for the GPU
        label_count = self.accelerator.reduce(torch.full((), labels, device=self.accelerator.device), "sum")
        divisor = label_count.clamp(min=1)  # a stream may give a step whose every row was left out: gradients of 0
        sums: dict[str, Tensor] = {}  # float32 scalars, this rank's
        for cpu_batch in micro_batches:
            # ids stay: a cached teacher looks its rows up by them, and would wait for the GPU to have them back
            batch = send_to_device(cpu_batch, self.accelerator.device, non_blocking=True, skip_keys="ids")
            with self.accelerator.accumulate(self.student):
                losses = self.student(batch, self.teacher_outputs(batch))
                self.accelerator.backward(losses["loss_sum"] / divisor * self.undo_averaging)
            sums = {name: value.detach().float() + sums.get(name, 0.0) for name, value in losses.items()}
        grad_norm = clip_grad_norm(self.accelerator, self.student, self.config.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meter.add(sums, label_count, grad_norm, counts)

    def evaluate(self, stage: str) -> dict[str, Any]:
        """Evaluates every validation split and reports it; stage is baseline, training or final. Raises Stopped."""
        try:
            metrics, samples = evaluate(
                self.student,
                self.task,
                self.accelerator,
                batch_size=self.config.evaluation.per_device_batch_size,
                max_samples=self.config.evaluation.max_samples,
                seed=self.config.training.seed,
                num_workers=self.num_workers,
                teacher_outputs=self.teacher_outputs,
                between_batches=self._break_off_if_stopped,
            )
        except Stopped:
            self._save_and_stop()
        self._on_rank_0_of_this_attempt(lambda: self.callbacks.evaluated(self.state, stage, metrics))
        bad = [name for name, value in metrics.items() if name.endswith("/loss") and not math.isfinite(value)]
        if bad and stage == "baseline":  # training would fail at its first report, and blame the rate
            raise TrainingError(
                f"{bad[0]} is {metrics[bad[0]]} before any training, with mixed precision "
                f"{self.accelerator.mixed_precision}: the weights that the run starts from are not sound"
            )
        if stage == "baseline" and self.config.checkpoint.keep_best and self.config.evaluation.every_steps is not None:
            self._best_metric(metrics)  # refused now, and not hours later
        if samples:
            self._on_rank_0_of_this_attempt(lambda: self.callbacks.sampled(self.state, stage, samples))
        return metrics

    def stop_if_asked(self) -> None:
        """Between two stages: raises Stopped on all ranks if any was asked, with the trained weights committed."""
        if self.vote.now():
            self._save_and_stop()

    def keep(self) -> None:
        """The last step's weights are on the disk, also where no checkpoint was asked for: there is more to come."""
        self._save(must=True)
        self.checkpoints.finish(self.state)

    def build_student(self, model: PreTrainedModel) -> Student:
        """The model with its loss; on its device, and not yet prepared."""
        objective = Objective(computing=self.config.training.loss)
        return Student(model, self.task.forward_options, self.language_head(model), objective)

    def teacher_outputs(self, batch: Batch, split: str | None = None) -> TeacherOutputs | None:
        """What the student is given beside a batch of training, or of this validation split: nothing, where there is
        no teacher."""
        return None

    def language_head(self, model: PreTrainedModel) -> LinearHead | None:
        """With it the loss needs no logits of a whole batch, which a large vocabulary makes larger than the model."""
        if not self.task.has_language_head:
            return None
        head = find_head(model, self.task.forward_options)
        if isinstance(head, str):
            unused = "" if self.config.training.loss == LossConfig() else ", and training.loss has no effect"
            logger.warning("the loss is computed from whole logits, which takes more memory%s: %s", unused, head)
            return None
        return head

    def _note_total(self) -> None:
        training = self.config.training
        steps = training.max_steps or max(1, self.batches.steps_for(training.epochs))
        self.total_steps = self.state.total_steps = steps

    def _note_position(self) -> None:
        self.state.samples = self.batches.samples_at(self.state.step)
        self.state.epoch = self.batches.epochs_at(self.state.step)

    def _report(self, rate: float) -> None:
        self._settle()
        if not self.meter.labels:
            raise TrainingError(
                f"no row of the last steps up to {self.state.step} has anything to learn: all of them were left out; "
                "raise task.max_length, or look at the data"
            )
        metrics = self.meter.metrics(rate)
        self._on_rank_0_of_this_attempt(lambda: self.callbacks.reported(self.state, metrics))

    def _evaluation_due(self) -> bool:
        last = self.state.step == self.total_steps
        return due(self.state.step, self.config.evaluation.every_steps) and not (
            last and self.config.evaluation.final  # which follows at once
        )

    def _evaluate_in_training(self) -> bool:
        """Is it the best so far?, and to be kept."""
        self._settle()  # nothing that is not finite is evaluated
        metrics = self.evaluate("training")
        self.state.evaluated_step = self.state.step
        return self._note_best(metrics) and self.config.checkpoint.keep_best

    def _make_up_for_evaluation(self) -> None:
        """The attempt before may have been stopped within the evaluation that was due at the checkpoint's step."""
        missing = self.state.step > 0 and self._evaluation_due() and self.state.evaluated_step < self.state.step
        if missing and self._evaluate_in_training():
            self._save()

    def _note_best(self, metrics: dict[str, Any]) -> bool:
        name = self._best_metric(metrics)
        value, best = metrics[name], self.state.best_metric
        lower = name.split("/")[-1] in LOWER_IS_BETTER
        if best is not None and best.name == name and (value >= best.value if lower else value <= best.value):
            return False
        self.state.best_metric = BestMetric(name=name, value=value, step=self.state.step)
        return True

    def _best_metric(self, metrics: dict[str, Any]) -> str:
        """The name of the one that tells the best checkpoint. Raises UsageError where an evaluation has no such."""
        name = self.config.checkpoint.best_metric or f"{next(iter(self.task.validation))}/{self.task.main_metric}"
        if name not in metrics:
            # Those that a checkpoint may be chosen by, and not those of a single class.
            there = [key for key, value in metrics.items() if isinstance(value, float) and key.count("/") == 1]
            there = [key for key in there if not key.endswith("/seconds")]
            meant = [key for key in there if key.endswith(f"/{name}")]
            hint = f"; did you mean {meant[0]}?" if meant else ""
            raise UsageError(f"checkpoint.best_metric is {name}, and the evaluation has: {', '.join(there)}{hint}")
        return name

    def _break_off_if_stopped(self) -> None:
        stop, _ = self.vote.cast(ready=False)
        if stop:
            raise Stopped("stopped")

    def _save(self, *, must: bool = False) -> None:
        if self.state.latest_checkpoint == self.run.checkpoint(self.state.step).name:
            return  # of this very step, by the attempt before
        self._settle()
        self.checkpoints.save(self.state, self.meter.progress(), must=must)

    def _save_and_stop(self) -> NoReturn:
        """Every rank comes here at the same step. Raises Stopped; TrainingError if no checkpoint could be written."""
        reason = self.vote.reason()
        try:
            self.checkpoints.finish(self.state)
        except TrainingError as error:  # of an earlier step; this one's may yet succeed
            logger.error("%s", error)
        if self.state.step > 0:
            self._save(must=True)
        raise Stopped(f"stopped by {reason}")

    def _settle(self) -> None:
        """Brings the state up to the step, for a report, an evaluation or a save; waits for the device."""
        self._note_position()
        self.state.tokens += self.meter.settle()
        self._check_finite()  # before a report, and before anything is saved

    def _told_of_save(self, state: TrainingState, saved: Saved) -> None:
        self.callbacks.saved(state, asdict(saved))

    def _on_rank_0_of_this_attempt(self, work: Callable[[], None]) -> None:
        """A full disk there must not leave the other ranks waiting; an outdated attempt must write nothing."""

        def guarded() -> None:
            self.lock.check()
            try:
                work()
            except OSError as error:
                newest = self.state.latest_checkpoint or "none yet"
                raise TrainingError(
                    f"step {self.state.step} could not be reported in {self.run.path} ({error}); the newest checkpoint "
                    f"is {newest}. Free some space there, then resume"
                ) from error

        on_rank_0(self.accelerator, guarded)

    def _check_finite(self) -> None:
        """Raises TrainingError at the first step since the last report whose loss or gradient is not finite."""
        losses, grad_norms = self.meter.losses(), self.meter.grad_norms()
        bad = ~torch.isfinite(losses)
        if self.accelerator.scaler is None:  # with fp16 an infinite gradient is a step that the scaler left out
            bad |= ~torch.isfinite(grad_norms)
        if not bad.any():
            return
        index = int(bad.nonzero()[0])
        step = self.state.step - len(losses) + index + 1
        newest = self.state.latest_checkpoint
        precise = self.accelerator.mixed_precision == "no"
        raise TrainingError(
            f"loss {losses[index]:.4g} and gradient norm {grad_norms[index]:.4g} at step {step} of {self.total_steps} "
            f"(rate {learning_rate(step - 1, self.total_steps, self.config.training):.2e}, mixed precision "
            f"{self.accelerator.mixed_precision}); nothing was saved after it, "
            f"{f'the newest checkpoint is {newest}' if newest else 'and no checkpoint before it'}. Try a lower "
            f"training.learning_rate{', a longer warm-up' if precise else ', a longer warm-up or mixed_precision: no'}"
        )


def world_facts(accelerator: Accelerator, training: TrainingConfig) -> dict[str, Any]:
    """What run_metadata.json tells of the ranks, and of how a step is spread over them."""
    rows_per_step, micro_batches = training.step_shape(accelerator.num_processes)
    return {
        "ranks": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "rows_per_step": rows_per_step,
        "micro_batches_per_rank": micro_batches,
        "deepspeed": plans_of(accelerator) or None,
    }


def due(step: int, every: int | None) -> bool:
    """Is a duty that comes every so many steps due at this one?"""
    return every is not None and step % every == 0
