"""The student with its loss inside: what Accelerate prepares, so that the loss sees whole weights under any plan."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.losses.cross_entropy import IGNORE, cross_entropy_sum
from forge.losses.linear_kd import Parts
from forge.model.head import LinearHead
from forge.task.batches import Batch, model_inputs
from forge.teacher.teacher import TeacherOutputs
from forge.trainer.objective import Objective, likeliest, linear_ce

ROWS_OF_LOGITS = 1024  # logits of so many positions exist at a time where only the likeliest token is sought


class Student(nn.Module):
    """Gives the sums that a step's loss is made of; the model's own loss is never asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward_options: dict[str, Any] | None = None,
        head: LinearHead | None = None,
        objective: Objective | None = None,
    ):
        """head: of this model; with it the loss is computed in pieces, and no batch of logits is ever held.
        objective: of a student that is given a teacher's outputs."""
        super().__init__()
        self.model = model
        self.forward_options = forward_options or {}
        self.head = head
        self.objective = objective

    def forward(self, batch: Batch, teacher: TeacherOutputs | None = None) -> dict[str, Tensor]:
        """batch: the model's inputs, labels (...) aligned with its logits (..., V), and positions (N,), where
        labels.flatten() is counted. teacher: its outputs at those positions; None: the loss is the cross-entropy.

        Returns scalars, sums over the labels in nats: loss_sum, the only one with a gradient, and with a teacher what
        it is made of: ce_sum; divergence_sum, at temperature T and without T^2.

        In eval mode instead ce_sum; predictions (...) int64, the likeliest labels, and anything where none is counted;
        confidences (N,) float32, their probabilities; with a teacher also kl_sum, KL(teacher || student) at temperature
        1, and agreed, int64: how many of its likeliest labels are the same.
        """
        inputs, labels = model_inputs(batch), batch["labels"]
        positions = batch["positions"] if "positions" in batch else (labels.flatten() != IGNORE).nonzero().squeeze(1)
        if self.head is None:
            logits = self.model(**inputs, **self.forward_options).logits
            if self.training:
                aligned = logits.flatten(0, -2)[batch["aligned"]] if self._is_universal(teacher) else None
                return self._loss_of_logits(logits, labels, positions, teacher, aligned)
            return self._judged(logits.flatten(0, -2)[positions], labels, positions, teacher)
        states = self.head.body(**inputs, **self.forward_options).last_hidden_state.flatten(0, -2)  # (B * T, D)
        hidden = states[positions]  # only what carries a label goes through the head
        if self.training:
            aligned = states[batch["aligned"]] if self._is_universal(teacher) else None
            return self._loss_of_hidden(self.head, hidden, labels.flatten()[positions], teacher, aligned)
        return self._judged(hidden, labels, positions, teacher)

    def _loss_of_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        positions: Tensor,
        teacher: TeacherOutputs | None,
        aligned: Tensor | None,
    ) -> dict[str, Tensor]:
        """logits: (..., V), labels: (...); aligned: (M, V)."""
        if teacher is None:
            return {"loss_sum": cross_entropy_sum(logits, labels)}
        at_labels = logits.flatten(0, -2)[positions], labels.flatten()[positions]
        return _sums(*self._objective.from_logits(*at_labels, teacher, aligned))

    def _loss_of_hidden(
        self,
        head: LinearHead,
        hidden: Tensor,
        labels: Tensor,
        teacher: TeacherOutputs | None,
        aligned: Tensor | None,
    ) -> dict[str, Tensor]:
        """hidden: (N, D), labels: (N,); aligned: (M, D)."""
        if teacher is not None:
            return _sums(*self._objective.from_hidden(head, hidden, labels, teacher, aligned))
        return {"loss_sum": linear_ce(head, hidden, labels)}

    def _judged(
        self, values: Tensor, labels: Tensor, positions: Tensor, teacher: TeacherOutputs | None
    ) -> dict[str, Tensor]:
        """values: (N, V) logits, or (N, D) hidden states where the student has a head."""
        head, counted = self.head, labels.flatten()[positions]
        kl: dict[str, Tensor] = {}
        if teacher is not None:
            told = self._objective.of_evaluation()
            loss = (
                told.from_logits(values, counted, teacher)
                if head is None
                else told.from_hidden(head, values, counted, teacher)
            )
            ce_sum, kl = loss[1].ce_sum, {"kl_sum": loss[1].kl_sum}
        else:
            ce_sum = cross_entropy_sum(values, counted) if head is None else linear_ce(head, values, counted)
        predictions, confidences = _likeliest(values, head)
        if teacher is not None:
            kl["agreed"] = (predictions == likeliest(teacher, self._objective, ROWS_OF_LOGITS)).sum()
        shaped = torch.zeros_like(labels).flatten().index_copy_(0, positions, predictions).view_as(labels)
        return {"ce_sum": ce_sum, "predictions": shaped, "confidences": confidences, **kl}

    def _is_universal(self, teacher: TeacherOutputs | None) -> bool:
        return teacher is not None and self._objective.is_universal

    @property
    def _objective(self) -> Objective:
        if self.objective is None:
            raise ValueError("A teacher's outputs were given to a student without an objective.")
        return self.objective


def _sums(loss_sum: Tensor, parts: Parts) -> dict[str, Tensor]:
    return {"loss_sum": loss_sum, "ce_sum": parts.ce_sum, "divergence_sum": parts.kl_sum}


def _likeliest(values: Tensor, head: LinearHead | None) -> tuple[Tensor, Tensor]:
    """Of (N, V) logits, or of (N, D) hidden states with their head: (N,) int64, and their probabilities, float32."""
    best, confidences = [], []
    with torch.autocast(values.device.type, enabled=False):  # in bf16 one row in twenty has two likeliest tokens
        exact = values if head is None else values.to(head.linear.weight.dtype)
        for rows in exact.split(ROWS_OF_LOGITS):
            logits = (rows if head is None else head.logits(rows)).float()
            highest, at = logits.max(dim=-1)
            best.append(at)
            confidences.append((highest - logits.logsumexp(dim=-1)).exp())
    return torch.cat(best), torch.cat(confidences)
