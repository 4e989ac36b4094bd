"""The student with its loss inside: what Accelerate prepares, so that the loss sees whole weights under any plan."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.data.batches import Batch, model_inputs
from forge.losses.cross_entropy import IGNORE, cross_entropy_sum
from forge.losses.linear_kd import Parts
from forge.model.attention import listening
from forge.model.head import LinearHead
from forge.ranks.deepspeed import Gathering
from forge.student.feature_terms import Features
from forge.student.objective import Objective, among_likeliest, likeliest, teachers_likeliest
from forge.teacher.teacher import TeacherOutputs


class Student(nn.Module):
    """Gives the sums that a step's loss is made of; the model's own loss is never asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward_options: dict[str, Any] | None = None,
        head: LinearHead | None = None,
        objective: Objective = Objective(),  # noqa: B008 - frozen
        features: Features | None = None,
    ):
        """head: of this model; with it the loss is computed in pieces, and no batch of logits is ever held.
        objective: the loss. features: what of its inside is drawn to the teacher's too."""
        super().__init__()
        self.model = model
        self.forward_options = forward_options or {}
        self.head = head
        self.at_head = Gathering(*(() if head is None else head.linear.parameters(recurse=False)))
        self.objective = objective
        self.features = features

    @property
    def projections(self) -> nn.ModuleDict | None:
        """What is trained beside the model, and is no part of it."""
        return self.features.projections if self.features is not None and len(self.features.projections) else None

    def forward(self, batch: Batch, teacher: TeacherOutputs | None = None) -> dict[str, Tensor]:
        """batch: the model's inputs, labels (...) aligned with its logits (..., V), and positions (N,), where
        labels.flatten() is counted. teacher: its outputs at those positions; None: the loss is the cross-entropy.

        Returns scalars, sums over the labels in nats: loss_sum, the only one with a gradient, and with a teacher what
        it is made of: ce_sum; divergence_sum, at temperature T and without T^2; hidden_sum and relation_sum, where they
        are configured, without their weights.

        In eval mode instead ce_sum; predictions (...) int64, the likeliest labels, and anything where none is counted;
        confidences (N,) float32, their probabilities; with a teacher also kl_sum, KL(teacher || student) at temperature
        1, and agreed, int64: how many of its likeliest labels are the same.
        """
        inputs, labels = model_inputs(batch), batch["labels"]
        positions = batch["positions"] if "positions" in batch else (labels.flatten() != IGNORE).nonzero().squeeze(1)
        if self.features is not None and self.training and teacher is not None:
            with listening(self.model, self.features.attention) as heard:
                result = self._run({**inputs, **self.features.options})
            losses = self._loss(result, batch, positions, teacher)
            added, parts = self.features(result, heard, batch, teacher)
            return {**losses, "loss_sum": losses["loss_sum"] + added, **parts}
        result = self._run(inputs)
        if self.training:
            return self._loss(result, batch, positions, teacher)
        values = result.logits if self.head is None else result.last_hidden_state
        return self.at_head(lambda: self._judged(values.flatten(0, -2)[positions], labels, positions, teacher))

    def _run(self, inputs: dict[str, Any]) -> Any:
        """The model's output; where the student has a head, that of the model below it."""
        run = self.model if self.head is None else self.head.body
        return run(**inputs, **self.forward_options)

    def _loss(self, result: Any, batch: Batch, positions: Tensor, teacher: TeacherOutputs | None) -> dict[str, Tensor]:
        """result: of _run. Where the two models read other tokens, they are compared at batch["aligned"]."""
        labels = batch["labels"]
        if self.head is None and teacher is None:
            return {"loss_sum": cross_entropy_sum(result.logits, labels)}
        values = (result.logits if self.head is None else result.last_hidden_state).flatten(0, -2)
        at_labels = values[positions], labels.flatten()[positions]  # only what carries a label goes through the head
        if teacher is None:
            assert self.head is not None
            head, objective = self.head, self.objective
            return self.at_head(lambda: {"loss_sum": objective.cross_entropy(head, *at_labels)})
        aligned = values[batch["aligned"]] if self.objective.is_universal else None
        if self.head is None:
            return _sums(*self.objective.from_logits(*at_labels, teacher, aligned))
        head, objective = self.head, self.objective
        return self.at_head(lambda: _sums(*objective.from_hidden(head, *at_labels, teacher, aligned)))

    def _judged(
        self, values: Tensor, labels: Tensor, positions: Tensor, teacher: TeacherOutputs | None
    ) -> dict[str, Tensor]:
        """values: (N, V) logits, or (N, D) hidden states where the student has a head."""
        head, counted = self.head, labels.flatten()[positions]
        objective = self.objective.of_evaluation()
        kl: dict[str, Tensor] = {}
        if teacher is not None:
            loss = (
                objective.from_logits(values, counted, teacher)
                if head is None
                else objective.from_hidden(head, values, counted, teacher)
            )
            ce_sum, kl = loss[1].ce_sum, {"kl_sum": loss[1].kl_sum}
        elif head is None:
            ce_sum = cross_entropy_sum(values, counted)
        else:
            ce_sum = objective.cross_entropy(head, values, counted)
        predictions, confidences = likeliest(values, head)
        if teacher is not None:
            told_likeliest = teachers_likeliest(teacher, objective)
            agreed = predictions == told_likeliest
            if "logits" in teacher:
                agreed |= among_likeliest(teacher["logits"], predictions)
            if head is None:
                agreed |= among_likeliest(values, told_likeliest)
            kl["agreed"] = agreed.sum()
        shaped = torch.zeros_like(labels).flatten().index_copy_(0, positions, predictions).view_as(labels)
        return {"ce_sum": ce_sum, "predictions": shaped, "confidences": confidences, **kl}


def _sums(loss_sum: Tensor, parts: Parts) -> dict[str, Tensor]:
    return {"loss_sum": loss_sum, "ce_sum": parts.ce_sum, "divergence_sum": parts.kl_sum}
