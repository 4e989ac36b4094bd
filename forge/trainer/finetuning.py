"""The loop: steps, rate, reports, evaluations and checkpoints of supervised fine-tuning over Accelerate."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from forge.checkpoint.contents import load_checkpoint, save_checkpoint
from forge.cluster.ranks import on_rank_0, rank_seed
from forge.config.schema import Config, TrainingConfig
from forge.errors import TrainingError
from forge.losses.cross_entropy import count_labels
from forge.run.directory import RunDirectory
from forge.run.state import TrainingState
from forge.task.batches import Batch, StepBatches
from forge.task.classification import Classification
from forge.trainer.callbacks import Callback
from forge.trainer.evaluation import evaluate
from forge.trainer.meter import StepMeter
from forge.trainer.optimizer import build_optimizer, learning_rate, step_shape, total_steps
from forge.trainer.student import Student


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
        task: Classification,
        model: PreTrainedModel,
        run: RunDirectory,
        state: TrainingState,
        callbacks: Callback,
    ):
        self.config, self.accelerator, self.task = config, accelerator, task
        self.run, self.state, self.callbacks = run, state, callbacks
        training = config.training

        self.rows_per_step, self.micro_batches = step_shape(training, accelerator.num_processes)
        # accelerator.backward divides by the micro-batches and DDP by the ranks; the loss is already divided by the
        # labels of the whole step, so both are taken back.
        self.undo_averaging = self.micro_batches * accelerator.num_processes
        accelerator.gradient_accumulation_steps = self.micro_batches

        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student = Student(model.to(accelerator.device))
        self.student, self.optimizer = accelerator.prepare(student, build_optimizer(student, training))
        # From here on every rank draws its own dropout.
        torch.manual_seed(rank_seed(training.seed, accelerator.process_index))

        self.batches = StepBatches(
            task.train,
            task.collate,
            rows_per_step=self.rows_per_step,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            micro_batches=self.micro_batches,
            seed=training.seed,
            group_by_length=training.length_grouping,
            num_workers=training.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.total_steps = state.total_steps = total_steps(training, self.batches.steps_per_epoch)
        self.meter = StepMeter(accelerator)

    def restore(self) -> None:
        """Goes back to the state's latest checkpoint; a run without one starts at its beginning."""
        if self.state.latest_checkpoint is not None:
            load_checkpoint(self.run, self.state, self.accelerator)
        else:  # whatever steps an attempt took, nothing holds their weights
            self.state.step, self.state.epoch = 0, 0.0

    def train(self) -> None:
        """Runs from the state's step to the last one. Raises TrainingError at a loss that is not finite."""
        self.batches.start_at(self.state.step)
        self.student.train()
        self.callbacks.training_started(self.state)
        self.meter.restart()
        save_every = self.config.checkpoint.every_steps
        while self.state.step < self.total_steps:
            rate = learning_rate(self.state.step, self.total_steps, self.config.training)
            self.train_step(self.batches.next_step(), rate)
            self.state.step += 1
            self.state.epoch = self.state.step / self.batches.steps_per_epoch
            self.callbacks.stepped(self.state)
            last = self.state.step == self.total_steps
            reports = last or due(self.state.step, self.config.logging.every_steps)
            saves = due(self.state.step, save_every) or (last and save_every is not None)
            evaluates = due(self.state.step, self.config.evaluation.every_steps)
            evaluates = evaluates and not (last and self.config.evaluation.final)  # which follows at once
            if reports or evaluates or saves:
                self._check_finite()  # before a report, and before anything is saved
            if reports:
                self._report(rate)
            if evaluates:
                with self.meter.paused():
                    self.evaluate("training")
            if saves:
                with self.meter.paused():
                    save_checkpoint(self.run, self.state, self.accelerator, self.config.checkpoint.keep_last)
        self.callbacks.training_ended(self.state)

    def train_step(self, micro_batches: list[Batch], rate: float) -> None:
        """One optimizer update at the given rate. Nothing here waits for the device, but for fp16's scaler."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counts = sum(int(count_labels(batch["labels"])) for batch in micro_batches)  # still on the CPU
        # torch.full and not torch.tensor: a copy from the CPU would wait for the GPU
        label_count = self.accelerator.reduce(torch.full((), counts, device=self.accelerator.device), "sum")
        ce_sum = torch.zeros((), device=self.accelerator.device)  # float32, this rank's
        tokens = 0
        for cpu_batch in micro_batches:
            tokens += int(cpu_batch["attention_mask"].sum())
            batch = send_to_device(cpu_batch, self.accelerator.device, non_blocking=True)
            with self.accelerator.accumulate(self.student):
                losses = self.student(batch)
                self.accelerator.backward(losses["ce_sum"] / label_count * self.undo_averaging)
            ce_sum += losses["ce_sum"].detach()
        max_norm = self.config.training.max_grad_norm
        grad_norm = self.accelerator.clip_grad_norm_(self.student.parameters(), max_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meter.add(ce_sum, label_count, grad_norm, tokens)

    def evaluate(self, stage: str) -> dict[str, float]:
        """Evaluates every validation split and reports it; stage is baseline, training or final."""
        metrics = evaluate(
            self.student,
            self.task,
            self.accelerator,
            batch_size=self.config.evaluation.per_device_batch_size,
            max_samples=self.config.evaluation.max_samples,
            seed=self.config.training.seed,
        )
        on_rank_0(self.accelerator, lambda: self.callbacks.evaluated(self.state, stage, metrics))
        return metrics

    @property
    def model(self) -> PreTrainedModel:
        """The bare model, for export."""
        return self.accelerator.unwrap_model(self.student).model

    def _report(self, rate: float) -> None:
        metrics = self.meter.metrics(rate)
        # A full disk there must not leave the other ranks waiting for rank 0.
        on_rank_0(self.accelerator, lambda: self.callbacks.reported(self.state, metrics))

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
    rows_per_step, micro_batches = step_shape(training, accelerator.num_processes)
    return {
        "ranks": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "rows_per_step": rows_per_step,
        "micro_batches_per_rank": micro_batches,
    }


def due(step: int, every: int | None) -> bool:
    """Is a duty that comes every so many steps due at this one?"""
    return every is not None and step % every == 0
