"""The loop over Accelerate: it fine-tunes (SFT), and with a teacher it distils (KD)."""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.attempt.attempt import Attempt
from forge.attempt.components import Components, shape_of_step
from forge.checkpoint.contents import Training, restore
from forge.checkpoint.shards import Named
from forge.cluster.signals import in_loader_worker
from forge.config.schema import LossConfig
from forge.data.batches import FILLER, Batch, Loading, Share, preparing, with_positions
from forge.data.stream import step_batches
from forge.errors import Stopped, TrainingError
from forge.losses.cross_entropy import count_labels
from forge.model.head import LinearHead, find_head
from forge.model.layers import compile_layers
from forge.model.load import LoadedModel
from forge.model.unused import unused_weights, use_varies
from forge.model.weights import trained_weights
from forge.ranks.accelerator import rank_seed
from forge.ranks.agreement import on_every_rank
from forge.ranks.deepspeed import clip_grad_norm, device_to_build_on, plans_of, prepare, weights_to_round
from forge.ranks.partitions import Partitions
from forge.run.state import Stage
from forge.student.evaluation import Evaluator
from forge.student.feature_terms import build_features
from forge.student.objective import Objective
from forge.student.student import Student
from forge.student.teacher_metrics import evaluate_teacher, teacher_metrics
from forge.teacher.placement import evaluates_teacher
from forge.teacher.teacher import Teacher, TeacherOutputs
from forge.trainer.meter import StepMeter
from forge.trainer.optimizer import build_optimizer, learning_rate

logger = logging.getLogger(__name__)


class LoopTrainer:
    """Trains with cross-entropy on the task's labels, or with (1 - alpha) * CE + alpha * T^2 * D(teacher || student)
    + feature terms.

    The loss of an optimizer step is the mean over all labels of the step: every label weighs the same, whatever
    the rank or the micro-batch that it came in. So one device with eight micro-batches, eight devices with one,
    and one large batch take the same step. With alpha 0 a teacher changes no bit of the training: it is only read in
    evaluations.
    """

    def __init__(self, components: Components, attempt: Attempt, teacher: Teacher | None = None):
        """teacher: placed on its device, or its cache; None: SFT."""
        self.attempt, self.components, self.teacher = attempt, components, teacher
        self.config, self.state = attempt.config, attempt.state
        self.task, self.accelerator = components.task, attempt.ranks.accelerator
        self.meter = StepMeter(self.accelerator)
        self._build_model(components.student)
        self._build_batches()
        attempt.attach(self.training, self)

    # The trainer protocol

    def restore(self, checkpoint: Path | None) -> None:
        """Continue from a verified checkpoint; None: start from the beginning."""
        on_every_rank(lambda: self._restore(checkpoint))
        if checkpoint is not None:
            self.attempt.prune()
        if self.state.reached(Stage.TRAINING):  # else the baseline's stage does it
            self.evaluate_teacher()

    def evaluate_teacher(self) -> None:
        """Report the teacher's own metrics as the evaluation `teacher`, unless the run has them already.

        They are computed, or read from an earlier run with the same teacher and rows. Raises Stopped.
        """
        teacher, config = self.teacher, self.config
        if teacher is None or not evaluates_teacher(config):
            return
        if not self.attempt.needs_teacher_metrics():
            return
        if config.distillation.aligns_tokens:
            logger.info("the teacher reads other tokens than the student: its own metrics are not evaluated")
            return
        compute = partial(evaluate_teacher, config, self.task, teacher, self.accelerator, self.attempt.stop_if_asked)
        try:
            made_by = str(self.attempt.run.path)
            metrics = teacher_metrics(config, self.task, teacher.origin, self.accelerator, compute, made_by)
        except Stopped:
            self.attempt.save_and_stop()
        if metrics is not None:
            self.attempt.evaluated("teacher", metrics, {})

    def evaluate(self, stage: str) -> dict[str, Any]:
        """Evaluate and report every validation split; stage is baseline, training or final. Raises Stopped."""
        evaluator = Evaluator(
            self.task,
            self.accelerator,
            batch_size=self.config.evaluation.per_device_batch_size,
            max_rows=self.config.evaluation.max_rows,
            seed=self.config.training.seed,
            num_workers=self.num_workers,
            teacher_outputs=self._teacher_outputs_in_evaluation,
            between_batches=self.attempt.stop_if_asked,
        )
        try:
            metrics, samples = evaluator.evaluate(self.student)
        except Stopped:
            self.attempt.save_and_stop()
        self.attempt.evaluated(stage, metrics, samples)
        return metrics

    def train(self) -> None:
        """Train from the state's step to the last one.

        Raises:
            TrainingError: A loss is not finite.
            Stopped: A signal came; a checkpoint is committed.
        """
        state, config, attempt = self.state, self.config, self.attempt
        self._say_what_cannot_be()
        self.batches.start_at(state.step)
        self.student.train()
        attempt.training_started()
        # The attempt before may have been stopped within the evaluation that was due at the checkpoint's step.
        with self.meter.paused():
            if state.step > state.evaluated_step and self._evaluation_is_due():
                self._evaluate_in_training()  # a new best has its checkpoint already: the one of this step
        while state.step < self.total_steps:
            rate = learning_rate(state.step, self.total_steps, config.training)
            with preparing(f"step {state.step + 1} of {self.total_steps}"):
                micro_batches = self.batches.next_step()
            self.train_step(micro_batches, rate)
            state.step += 1
            attempt.stepped()
            if self._is_due(config.logging.every_steps, at_end=True):
                self._report(rate)
            save = self._is_due(config.checkpoint.every_steps, at_end=True)
            if self._evaluation_is_due():
                with self.meter.paused():
                    save = self._evaluate_in_training() or save
            attempt.boundary(save=save)
        self.batches.close()
        attempt.training_ended()

    def close(self) -> None:
        """However training ended, leave no process, no thread and no model behind."""
        self.batches.close()
        if self.teacher is not None:
            self.teacher.close()
        try:
            self.accelerator.free_memory()
        except RuntimeError as error:  # of a device that has failed: what it failed at is reported, and not this
            logger.warning("the device's memory could not be freed (%s)", str(error).splitlines()[0][:200])

    def train_step(self, micro_batches: list[Batch], rate: float) -> None:
        """Take one optimizer step at the given rate.

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
        sums: dict[str, Tensor] = {}  # () float32 each, this rank's
        for cpu_batch in micro_batches:
            # ids stay: a cached teacher looks its rows up by them, and would wait for the GPU to have them back
            batch = send_to_device(cpu_batch, self.accelerator.device, non_blocking=True, skip_keys="ids")
            with self.accelerator.accumulate(self.student):
                losses = self.student(batch, self._teacher_outputs_in_training(batch))
                self.accelerator.backward(losses["loss_sum"] / divisor * self._undo_averaging)
            sums = {name: value.detach().float() + sums.get(name, 0.0) for name, value in losses.items()}
        grad_norm = clip_grad_norm(self.accelerator, self.student, self.config.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meter.add(sums, label_count, grad_norm, counts)

    # What the attempt asks

    def settle(self) -> dict[str, Any]:
        """Bring the state up to the last step, waiting for the device; return the next report's progress so far.

        Raises:
            TrainingError: A loss since the last report is not finite.
        """
        self._note_position()
        self.state.tokens += self.meter.settle()
        self._check_finite()
        return self.meter.progress()

    def paused(self) -> AbstractContextManager[None]:
        """Time spent inside does not count as training time."""
        return self.meter.paused()

    # Building

    def _build_model(self, loaded: LoadedModel) -> None:
        """The student on its device with its optimizer, prepared; and what a checkpoint takes of them."""
        training, accelerator, model = self.config.training, self.accelerator, loaded.model
        _, micro_batches = shape_of_step(accelerator, training, self.task)
        # accelerator.backward divides by the micro-batches and DDP by the ranks; the loss is already divided by the
        # labels of the whole step, so both are undone.
        self._undo_averaging = micro_batches * accelerator.num_processes
        accelerator.gradient_accumulation_steps = micro_batches
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        cast(nn.Module, model).to(device_to_build_on(accelerator))
        self.model = model
        if training.compile:
            compile_layers(model)
        student = self._build_student(model)
        if training.compile and self.teacher is not None:
            self.teacher.compile()
        self.weights = trained_weights(model, loaded.base_origin)
        optimizer = build_optimizer(student, training)
        named = Named.of(self.weights.tensors(), model, student.projections, optimizer)
        unrounded = weights_to_round(accelerator, named.trained.values())
        self._allow_unused_weights(student)
        self.student, self.optimizer = prepare(accelerator, student, optimizer)
        partitions = Partitions(self.optimizer) if plans_of(accelerator) else None
        if partitions is not None:
            partitions.set_weights(unrounded)
        # From here on every rank draws its own dropout.
        torch.manual_seed(rank_seed(training.seed, accelerator.process_index))
        self.training = Training(
            accelerator, self.weights, self.optimizer, training.seed, student.projections, named, partitions
        )

    def _build_student(self, model: PreTrainedModel) -> Student:
        """The model with its loss; on its device, not yet prepared."""
        config, options, head = self.config, self.task.forward_options, self._language_head(model)
        if self.teacher is None:
            return Student(model, options, head, Objective(computing=config.training.loss))
        teacher, distillation = self.teacher, config.distillation
        objective = Objective(distillation, teacher.logit_scale, teacher.softcap, config.training.loss)
        features = build_features(distillation, config.training.seed, model, options, teacher, self._any_batch())
        teacher.whole_logits = head is None
        return Student(model, options, head, objective, features)

    def _allow_unused_weights(self, student: Student) -> None:
        """Have data parallelism look for weights without a gradient at each step, where there may be some.

        It would wait for their gradients, and fail at the second step. One row's graph shows them, without a backward
        pass and without dropout.
        """
        accelerator = self.accelerator
        if accelerator.num_processes == 1 or plans_of(accelerator):
            return
        student.train()
        student.model.eval()
        # the import of torch's compiler takes seconds
        with torch.compiler.set_stance("force_eager") if self.config.training.compile else nullcontext():
            loss = student(self._any_batch())["loss_sum"]
        student.train()
        projections = {} if student.projections is None else dict(student.projections.named_parameters())
        of_teacher = {id(weight) for weight in projections.values()}  # no loss without a teacher depends on them
        weights = dict(student.named_parameters())
        unused = [name for name in unused_weights(student, loss) if id(weights[name]) not in of_teacher]
        if unused or use_varies(student.model):
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        if unused:
            names = ", ".join(name.removeprefix("model.") for name in unused[:3])
            logger.info(
                "%d weights have no part in the loss, so they are not trained, and no rank waits for their gradients: "
                "%s%s",
                *(len(unused), names, ", …" if len(unused) > 3 else ""),
            )

    def _language_head(self, model: PreTrainedModel) -> LinearHead | None:
        """The head to fuse with the loss, so that no logits of a whole batch are held: they may be larger than the
        model. None where the task or the model has no such head."""
        if not self.task.has_language_head:
            return None
        head = find_head(model, self.task.forward_options)
        if isinstance(head, str):
            unused = "" if self.config.training.loss == LossConfig() else ", and training.loss has no effect"
            logger.warning("the loss is computed from whole logits, which takes more memory%s: %s", unused, head)
            return None
        return head

    def _any_batch(self) -> Batch:
        """One row on the device, to see the shapes that the models make of it."""
        row = next(iter(self.task.validation.values()))[0]
        return send_to_device(with_positions(self.task.collate([row]), [0]), self.accelerator.device)

    def _build_batches(self) -> None:
        """The training rows in the order of the seed, this rank's share of each step."""
        training, task, accelerator = self.config.training, self.task, self.accelerator
        rows_per_step, micro_batches = shape_of_step(accelerator, training, task)
        self.num_workers = task.num_workers if training.num_workers is None else training.num_workers
        self.batches = step_batches(
            task.train,
            task.collate,
            rows_per_step,
            Share(accelerator.process_index, accelerator.num_processes, micro_batches),
            seed=training.seed,
            group_by_length=training.length_grouping,
            loading=Loading(self.num_workers, accelerator.device.type == "cuda", in_loader_worker),
        )
        self.state.step_sizes = self.batches.step_sizes
        self._note_total()

    # Position

    def _restore(self, checkpoint: Path | None) -> None:
        state = self.state
        progress = None
        if checkpoint is None:  # whatever steps an attempt took, nothing holds their weights
            state.step, state.epoch, state.samples, state.tokens, state.evaluated_step = 0, 0.0, 0, 0, 0
            state.best_metric, state.kept_best, state.step_sizes = None, None, self.batches.step_sizes
        else:
            saved, progress = restore(self.training, checkpoint)
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
            logger.warning("%d steps were asked for, but %d are taken already", self.total_steps, state.step)
        if state.step < self.total_steps and state.reached(Stage.EXPORT):
            state.stage = Stage.TRAINING  # the checkpoints of later steps are lost, and what was made of them outdated

    def _note_total(self) -> None:
        training = self.config.training
        steps = training.max_steps or max(1, self.batches.steps_for(training.epochs))
        self.total_steps = self.state.total_steps = steps

    def _note_position(self) -> None:
        self.state.samples = self.batches.rows_at(self.state.step)
        self.state.epoch = self.batches.epochs_at(self.state.step)

    def _say_what_cannot_be(self) -> None:
        """Warn of settings that the number of rows or of steps leaves without their effect."""
        training, total, every = self.config.training, self.total_steps, self.config.evaluation.every_steps
        notices = [] if self.batches.shortage is None else [self.batches.shortage]
        if training.warmup_steps is not None and training.warmup_steps > total:
            notices.append(
                f"training.warmup_steps is {training.warmup_steps}, but the run takes only {total} steps: the learning "
                f"rate rises to {total / training.warmup_steps:.0%} of training.learning_rate, and training ends there"
            )
        if every is not None and every > total:
            notices.append(
                f"evaluation.every_steps is {every}, but the run takes only {total} steps: nothing is evaluated during "
                "training"
            )
        for notice in notices if self.attempt.ranks.is_main else []:
            logger.warning(notice)

    # Duties of the loop

    def _is_due(self, every: int | None, *, at_end: bool | None = None) -> bool:
        """True at every so many steps (None: never); at_end: whether the last step counts, if that is not like all."""
        if every is None:
            return False
        if at_end is not None and self.state.step == self.total_steps:
            return at_end
        return self.state.step % every == 0

    def _evaluation_is_due(self) -> bool:
        """The last step is left to the final evaluation, if there is one."""
        return self._is_due(self.config.evaluation.every_steps, at_end=False if self.config.evaluation.final else None)

    def _report(self, rate: float) -> None:
        self.settle()
        if not self.meter.labels:
            raise TrainingError(
                f"no row of the last steps up to {self.state.step} has anything to learn: all of them were left out; "
                "raise task.max_length, or look at the data"
            )
        self.attempt.report(self.meter.metrics(rate))

    def _evaluate_in_training(self) -> bool:
        """Evaluate; True if a checkpoint of this step is to be kept as the best so far."""
        self.settle()  # nothing that is not finite is evaluated
        return self.attempt.is_new_best(self.evaluate("training"))

    def _teacher_outputs_in_training(self, batch: Batch) -> TeacherOutputs | None:
        distillation = self.config.distillation
        if self.teacher is None or distillation.alpha == 0:
            return None
        return self.teacher.outputs(batch, None, distillation.temperature)

    def _teacher_outputs_in_evaluation(self, batch: Batch, split: str) -> TeacherOutputs | None:
        """For agreement and KL, which two models over different tokens do not have."""
        if self.teacher is None or self.config.distillation.aligns_tokens or not evaluates_teacher(self.config):
            return None
        return self.teacher.outputs(batch, split, 1.0)

    def _check_finite(self) -> None:
        """Raise TrainingError at the first step since the last report whose loss or gradient is not finite."""
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
