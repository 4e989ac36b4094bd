"""The loop: the same step however it is split, the loss it reports, and when it refuses to go on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pair_rows

from forge.errors import TrainingError, UsageError
from forge.losses.cross_entropy import IGNORE

Build = Callable[..., Any]
SHOWN = ("ce", "accuracy", "macro_f1", "ece")


def trajectory(trainer: Any) -> tuple[list[float], list[float]]:
    """Trains, and gives reported losses and final weights. Before the next build: Accelerate shares state."""
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return [report["loss"] for report in trainer.attempt.callbacks.reports], weights.tolist()


def test_one_large_batch_and_many_micro_batches_take_the_same_steps(build_trainer: Build) -> None:
    losses, weights = trajectory(build_trainer("training.per_device_batch_size=8"))
    for size in (1, 3):  # 3: micro-batches of unequal size
        split_losses, split_weights = trajectory(build_trainer(f"training.per_device_batch_size={size}"))

        assert split_losses == pytest.approx(losses, rel=1e-5)
        assert split_weights == pytest.approx(weights, abs=1e-5)


def test_the_loop_learns_what_can_be_learned(build_trainer: Build) -> None:
    trainer = build_trainer("training.max_steps=150")
    before = trainer.evaluate("baseline")
    trainer.train()
    after = trainer.evaluate("baseline")

    assert before["matched/accuracy"] < 0.6
    assert after["matched/accuracy"] == 1.0
    assert after["matched/ce"] < 0.2 < before["matched/ce"]


def test_the_classic_accumulation_gives_the_same_step_as_batch_size(build_trainer: Build) -> None:
    losses, weights = trajectory(build_trainer("training.per_device_batch_size=8"))
    classic = build_trainer("training.per_device_batch_size=2", "training.gradient_accumulation_steps=4")

    assert classic.state.step_sizes == [[0, 8]]
    classic_losses, classic_weights = trajectory(classic)
    assert classic_losses == pytest.approx(losses, rel=1e-5)
    assert classic_weights == pytest.approx(weights, abs=1e-5)


def test_the_short_last_step_of_an_epoch_weighs_its_rows_alone(build_trainer: Build) -> None:
    """48 rows in steps of 20: the third has 8 rows, and places of it are empty with micro-batches of 2."""
    settings = ("training.batch_size=20", "training.max_steps=4")
    losses, weights = trajectory(build_trainer(*settings))
    split = build_trainer(*settings, "training.per_device_batch_size=2")
    split_losses, split_weights = trajectory(split)

    assert split.config.training.step_shape(1) == (20, 10)
    assert split_losses == pytest.approx(losses, rel=1e-5)
    assert split_weights == pytest.approx(weights, abs=1e-5)


def test_three_steps_are_those_of_plain_torch(build_trainer: Build) -> None:
    """Against one large batch, torch's own cross-entropy, clipping and AdamW: rate, betas, epsilon and decay."""
    settings = ("training.max_steps=3", "training.warmup_steps=0", "training.adam_beta2=0.95")
    reference = build_trainer(*settings, "training.per_device_batch_size=8")
    reference.batches.start_at(0)
    model = reference.model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    spared = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-3)
    expected = []
    for rate in (3e-3, 2e-3, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = rate
        (batch,) = reference.batches.next_step()
        labels = batch.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append((loss.item(), norm.item(), rate))

    trainer = build_trainer(*settings, "training.per_device_batch_size=2")
    _, weights = trajectory(trainer)
    for report, (loss, norm, rate) in zip(trainer.attempt.callbacks.reports, expected, strict=True):
        assert report["loss"] == pytest.approx(loss, rel=1e-5)
        assert report["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert report["learning_rate"] == pytest.approx(rate)
    assert weights == pytest.approx(torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(), abs=1e-5)


def test_a_report_is_the_mean_over_the_labels_since_the_last_one(build_trainer: Build) -> None:
    settings = ("training.batch_size=20", "training.max_steps=6")
    losses, _ = trajectory(build_trainer(*settings))
    means_of_three, _ = trajectory(build_trainer(*settings, "logging.every_steps=3"))
    rows = [20, 20, 8, 20, 20, 8]
    means = [sum(losses[i + j] * rows[i + j] for j in range(3)) / 48 for i in (0, 3)]
    assert means_of_three == pytest.approx(means, rel=1e-6)


def test_gradients_are_clipped_to_the_norm(build_trainer: Build) -> None:
    settings = ("training.max_steps=1", "training.warmup_steps=0")
    free = build_trainer(*settings, "training.max_grad_norm=null")
    before = torch.cat([p.detach().flatten() for p in free.model.parameters()])
    moved_free = torch.tensor(trajectory(free)[1]) - before
    clipped = build_trainer(*settings, "training.max_grad_norm=1e-9")
    moved_clipped = torch.tensor(trajectory(clipped)[1]) - before

    assert moved_free.abs().max() > 2e-3  # AdamW's first step has the size of the rate, 3e-3
    assert moved_clipped.abs().max() < 2e-4  # a gradient far below epsilon, and the decay
    norms = [trainer.attempt.callbacks.reports[0]["grad_norm"] for trainer in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1])


def test_gradient_checkpointing_changes_no_number(build_trainer: Build) -> None:
    losses, weights = trajectory(build_trainer())
    recomputed = build_trainer("training.gradient_checkpointing=true")

    assert recomputed.model.is_gradient_checkpointing
    recomputed_losses, recomputed_weights = trajectory(recomputed)
    assert recomputed_losses == pytest.approx(losses, rel=1e-6)
    assert recomputed_weights == pytest.approx(weights, abs=1e-6)


def test_bf16_computes_in_bf16_and_keeps_its_weights_in_float32(build_trainer: Build) -> None:
    plain, _ = trajectory(build_trainer())
    trainer = build_trainer("training.mixed_precision=bf16")
    seen = []
    trainer.model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses, _ = trajectory(trainer)

    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses == pytest.approx(plain, rel=0.1)
    assert losses != pytest.approx(plain, rel=1e-6)


def poison(step: int, *, gradient: bool) -> Callable[[Any], None]:
    """Makes the loss, or only the gradient, of one step nan; the steps have one micro-batch."""

    def mutate(model: Any) -> None:
        calls = []

        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) != step:
                return output
            if gradient:
                output.register_hook(lambda grad: grad * float("nan"))
                return output
            return output * float("nan")

        model.classifier.register_forward_hook(spoil)

    return mutate


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_stops_the_run_with_the_step_and_the_checkpoint_before(
    gradient: bool, build_trainer: Build
) -> None:
    trainer = build_trainer("logging.every_steps=100", mutate=poison(5, gradient=gradient))
    with pytest.raises(TrainingError, match=r"norm nan at step 5 of 6 .*newest checkpoint is checkpoint-3"):
        trainer.train()
    assert sorted(path.name for path in trainer.attempt.run.path.glob("checkpoint-*")) == ["checkpoint-3"]
    assert trainer.attempt.callbacks.reports == []


def test_nothing_that_is_not_finite_is_saved_between_two_reports(build_trainer: Build) -> None:
    trainer = build_trainer("logging.every_steps=100", mutate=poison(2, gradient=True))
    with pytest.raises(TrainingError, match=r"at step 2 of 6 .*no checkpoint before it"):
        trainer.train()
    assert list(trainer.attempt.run.path.glob("checkpoint-*")) == []


def test_evaluation_counts_every_row_once_and_leaves_training_as_it_was(build_trainer: Build) -> None:
    trainer = build_trainer("evaluation.per_device_batch_size=4")
    metrics = trainer.evaluate("baseline")

    assert trainer.student.training
    assert metrics["matched/rows"] == 13
    assert metrics["other/rows"] == 7
    assert sum(metrics[f"matched/labelled/{name}"] for name in trainer.task.labels) == 13
    rows = trainer.task.collate([trainer.task.validation["matched"][i] for i in range(13)])
    labels = rows.pop("labels")
    with torch.no_grad():
        logits = trainer.model.eval()(**rows).logits
    assert metrics["matched/accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert metrics["matched/ce"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_quick_look_says_of_how_many_rows_it_is(build_trainer: Build) -> None:
    metrics = build_trainer("evaluation.max_rows=9").evaluate("final")

    drawn = np.random.default_rng(42).permutation(13)[:9]
    neutral = sum(pair_rows(13, offset=100)[row]["label"] == 1 for row in drawn)
    assert metrics["matched/labelled/neutral"] == neutral != 3  # 3 of the first nine
    assert (metrics["matched/rows"], metrics["matched/rows_of"]) == (9, 13)
    assert metrics["other/rows"] == 7
    assert "other/rows_of" not in metrics


def test_evaluation_during_training_comes_when_it_is_due_and_not_twice_at_the_end(build_trainer: Build) -> None:
    trainer = build_trainer("evaluation.every_steps=2")
    trainer.train()

    assert trainer.attempt.callbacks.evaluations == [("training", 2), ("training", 4)]
    alone = build_trainer("evaluation.every_steps=3", "evaluation.final=false")
    alone.train()
    assert alone.attempt.callbacks.evaluations == [("training", 3), ("training", 6)]


@pytest.mark.parametrize(("name", "hint"), [("loss", "; did you mean matched/ce?"), ("matched/bleu", "")])
def test_a_best_metric_that_there_is_not_is_refused_after_the_baseline(
    build_trainer: Build, name: str, hint: str
) -> None:
    trainer = build_trainer("evaluation.every_steps=2", f"checkpoint.best_metric={name}")
    with pytest.raises(UsageError) as refused:
        trainer.evaluate("baseline")
    there = ", ".join(f"{split}/{metric}" for split in ("matched", "other") for metric in SHOWN)
    assert f"checkpoint.best_metric is {name}," in str(refused.value)
    assert str(refused.value).endswith(f" {there}{hint}")
    build_trainer(f"checkpoint.best_metric={name}").evaluate("baseline")  # nothing is chosen by it


def test_a_step_without_any_label_changes_no_gradient_and_reports_a_loss_of_0(build_trainer: Build) -> None:
    """A stream may give one, whose every row was left out."""
    trainer = build_trainer("training.weight_decay=0")
    trainer.batches.start_at(0)
    before = [weight.clone() for weight in trainer.model.parameters()]
    micro_batches = trainer.batches.next_step()
    for batch in micro_batches:
        batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    trainer.train_step(micro_batches, rate=1e-3)
    trainer.meter.settle()
    assert trainer.meter.losses().tolist() == [0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_weights_that_are_not_sound_are_told_before_training(build_trainer: Build) -> None:
    def spoil(model: torch.nn.Module) -> None:
        next(model.parameters()).data.fill_(float("nan"))

    trainer = build_trainer(mutate=spoil)
    with pytest.raises(TrainingError, match=r"matched/ce is nan before any training, with mixed precision no: the"):
        trainer.evaluate("baseline")


def test_a_batch_larger_than_the_data_is_told_and_costs_no_more(
    build_trainer: Build, caplog: pytest.LogCaptureFixture
) -> None:
    """48 rows, of which every step takes all: in two micro-batches of 24, not in 22 of two or three."""
    trainer = build_trainer("training.batch_size=512", "training.per_device_batch_size=24", "training.max_steps=2")
    losses, _ = trajectory(trainer)
    assert trainer.accelerator.gradient_accumulation_steps == 2
    assert trainer.components.facts(trainer.config, trainer.accelerator)["world"]["micro_batches_per_rank"] == 2
    assert "the batch of a step is 512 rows, but the training split has only 48: each step takes all of them" in [
        record.message for record in caplog.records
    ]
    whole, _ = trajectory(build_trainer("training.batch_size=48", "training.max_steps=2"))
    assert losses == pytest.approx(whole, rel=1e-5)


def test_settings_that_are_longer_than_the_training_are_told(
    build_trainer: Build, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer("training.warmup_steps=20", "evaluation.every_steps=50", "training.max_steps=5")
    trainer.train()
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert messages == [
        "training.warmup_steps is 20, but the run takes only 5 steps: the learning rate rises to 25% of "
        "training.learning_rate, and training ends there",
        "evaluation.every_steps is 50, but the run takes only 5 steps: nothing is evaluated during training",
    ]
    caplog.clear()
    build_trainer("training.warmup_steps=5", "evaluation.every_steps=5", "training.max_steps=5").train()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
