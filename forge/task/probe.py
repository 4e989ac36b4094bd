"""Shows on a few tokens, when a model is loaded, that it does what its loss and its metrics rest on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from forge.data.batches import Row, model_inputs, teacher_inputs
from forge.errors import UsageError
from forge.task.task import Task

logger = logging.getLogger(__name__)

# A leak changes logits by thousandths of their standard deviation and more, even in a model with new weights; the
# rounding of float32 is a few millionths of it. 4-bit weights compute in 16 bits.
TOLERANCE, TOLERANCE_4BIT = 1e-4, 5e-2
LOSS_TOLERANCE = 1e-3
TOKENS, PADDING = 4, 2


def check_causal(model: PreTrainedModel, forward_options: dict[str, Any], key: str) -> None:
    """Raise UsageError unless a model predicts each token from those before it, and from them alone.

    Changing the last token must not move an earlier logit, and a row's logits must be the same alone and next to a
    longer row. The model's own loss must be the cross-entropy of the next tokens, which forge computes from its logits.
    """
    name = f"{key}: {type(model).__name__}"
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, TOKENS + PADDING), generator=torch.Generator().manual_seed(0))
    row, longer = ids[0, :TOKENS].to(model.device), ids[1].to(model.device)
    changed = torch.cat([row[:-1], (row[-1:] + 1) % vocabulary])
    batch = torch.stack([*(torch.cat([short, short.new_zeros(PADDING)]) for short in (row, changed)), longer])
    mask = torch.ones_like(batch)
    mask[:2, TOKENS:] = 0
    with _evaluating(model, name):
        labels = {"labels": row[None]} if "labels" in signature(model.forward).parameters else {}
        alone = model(input_ids=row[None], **labels, **forward_options)
        logits = model(input_ids=batch, attention_mask=mask, **forward_options).logits.float()  # (3, T, V)
    expected = alone.logits[0].float()  # (T, V)
    tolerance = TOLERANCE_4BIT if getattr(model, "is_quantized", False) else TOLERANCE
    spread = float(expected[expected.isfinite()].std())
    moved = _difference(logits[0, : TOKENS - 1], logits[1, : TOKENS - 1]) / spread
    if moved > tolerance:
        raise UsageError(
            f"{name} is not causal: changing a token changes the logits before it, by {moved:.1g} of their standard "
            "deviation, so it sees the tokens that it is to predict; use a model that was made to continue texts"
        )
    moved = _difference(expected, logits[0, :TOKENS]) / spread
    if moved > 10 * tolerance:  # kernels round in another order for another shape, and deep models add that up
        raise UsageError(
            f"{name} gives a row other logits next to a longer row, by {moved:.1g} of their standard deviation, so its "
            "loss would depend on the batch; use another model"
        )
    own = getattr(alone, "loss", None)
    right = cross_entropy(expected[:-1], row[1:])
    if own is None or getattr(model.config.get_text_config(), "output_router_logits", False):  # with losses of routers
        return
    if abs(float(own) - float(right)) > max(LOSS_TOLERANCE, tolerance) * max(1.0, abs(float(right))):
        raise UsageError(
            f"{name} has a loss of its own ({float(own):.4g}) that is not the cross-entropy of the next tokens "
            f"({float(right):.4g}), so its logits do not predict the token that follows; use another model"
        )


def check_padding(task: Task, model: PreTrainedModel, key: str) -> None:
    """Raise UsageError for a classifier whose logits of a row change with padding on the left of it.

    If they change with padding on the right (models with convolutions), that is reported. The rows are the shortest one
    of the training split and the next longer one, as the task gives them to this model.
    """
    rows = _two_lengths(task)
    if rows is None:
        return
    name = f"{key}: {type(model).__name__}"
    with _evaluating(model, name):
        alone, beside = (_logits(task, model, chosen, key) for chosen in (rows[:1], rows))
    moved = _difference(alone, beside[:1]) / float(beside.abs().max())
    if moved <= (TOLERANCE_4BIT if getattr(model, "is_quantized", False) else TOLERANCE):
        return
    if task.tokenizer_of(key).padding_side == "left":
        raise UsageError(
            f"{name} gives a row other logits next to a longer row: its tokenizer pads on the left, and its positions "
            "count the padding; set padding_side to right in its tokenizer_config.json, or name another by "
            f"{key}.tokenizer"
        )
    logger.warning(
        "%s gives a row other logits next to a longer row, by %.1g of the largest: its numbers depend on the rows that "
        "share a batch, and so on evaluation.per_device_batch_size",
        *(name, moved),
    )


@contextmanager
def _evaluating(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Put the model into eval mode, without gradients. Raises UsageError if it cannot read the tokens."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UsageError(f"{name} cannot read a few tokens ({reason}); use another model") from error
    finally:
        model.train(training)


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors of logits; -inf, the logit of a masked token, equals -inf."""
    finite = one.isfinite() & other.isfinite()
    if not finite.any() or not torch.equal(one[~finite], other[~finite]):
        return float("inf")
    return float((one[finite] - other[finite]).abs().max())


def _two_lengths(task: Task) -> list[Row] | None:
    """Return two rows of the training split of which the second is longer; None if all are equally long."""
    lengths = torch.tensor(task.train["length"][:])
    shortest = int(lengths.argmin())
    longer = torch.where(lengths > lengths[shortest], lengths, lengths.max() + 1)
    second = int(longer.argmin())
    return None if lengths[second] == lengths[shortest] else [task.train[shortest], task.train[second]]


def _logits(task: Task, model: PreTrainedModel, rows: list[Row], key: str) -> Tensor:
    batch = task.collate(rows)
    inputs = teacher_inputs(batch) if key == "teacher" else model_inputs(batch)
    logits: Tensor = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits
    return logits.float()
