"""The student with its loss inside: what Accelerate prepares, so that the loss sees whole weights under any plan."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.data.batches import Batch, model_inputs
from forge.losses.cross_entropy import IGNORE, cross_entropy_sum
from forge.losses.kd_arguments import HeadInput
from forge.model.attention import capture_outputs
from forge.model.head import LinearHead
from forge.ranks.deepspeed import Gathering
from forge.student.feature_terms import Features
from forge.student.objective import Objective, StudentOutputs, argmax_labels, teacher_argmax, tied_for_argmax
from forge.teacher.teacher import TeacherOutputs


class Student(nn.Module):
    """Gives the sums that the loss of a step is made of; the model's own loss is not used."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward_options: dict[str, Any] | None = None,
        head: LinearHead | None = None,
        objective: Objective = Objective(),  # noqa: B008 - frozen
        features: Features | None = None,
    ):
        """Put the loss around a model.

        head: of this model; with it the loss is computed in pieces, and no batch of logits ever exists. features: the
        terms that match its hidden states and relations to the teacher's.
        """
        super().__init__()
        self.model = model
        self.forward_options = forward_options or {}
        self.head = head
        self.at_head = Gathering(*(() if head is None else head.linear.parameters(recurse=False)))
        self.objective = objective
        self.features = features

    @property
    def projections(self) -> nn.ModuleDict | None:
        """The weights that are trained with the model without being part of it."""
        return self.features.projections if self.features is not None and len(self.features.projections) else None

    def forward(self, batch: Batch, teacher: TeacherOutputs | None = None) -> dict[str, Tensor]:
        """Return scalars, sums over the labels in nats.

        Args:
            batch: the model's inputs; labels (...) int64, aligned with its logits (..., V); and positions (N,), where
                labels.flatten() is counted.
            teacher: its outputs at those positions; None: the loss is the cross-entropy.

        In training mode: loss_sum, the only one with a gradient, and with a teacher its parts: ce_sum; divergence_sum,
        at temperature T and without T^2; and where they are configured hidden_sum and relation_sum, without their
        weights.

        In eval mode: ce_sum; predictions (...) int64, the argmax labels, arbitrary where no label is counted;
        confidences (N,) float32, their probabilities; with a teacher also kl_sum, KL(teacher || student) at temperature
        1, and agreed, int64, the number of labels where both models have the same argmax.
        """
        inputs, labels = model_inputs(batch), batch["labels"]
        positions = batch["positions"] if "positions" in batch else (labels.flatten() != IGNORE).nonzero().squeeze(1)
        if self.features is not None and self.training and teacher is not None:
            with capture_outputs(self.model, self.features.attention) as captured:
                result = self._run({**inputs, **self.features.options})
            losses = self._loss(result, batch, positions, teacher)
            added, parts = self.features(result, captured, batch, teacher)
            return {**losses, "loss_sum": losses["loss_sum"] + added, **parts}
        result = self._run(inputs)
        if self.training:
            return self._loss(result, batch, positions, teacher)
        values = result.logits if self.head is None else result.last_hidden_state
        return self.at_head(lambda: self._evaluated(values.flatten(0, -2)[positions], labels, positions, teacher))

    def _run(self, inputs: dict[str, Any]) -> Any:
        """Return the model's output; where the student has a head, that of the model below it."""
        run = self.model if self.head is None else self.head.body
        return run(**inputs, **self.forward_options)

    def _outputs(self, values: Tensor) -> StudentOutputs:
        """values: (N, V) logits, or (N, D) hidden states where the student has a head. Reads the head's weights."""
        if self.head is None:
            return values
        linear = self.head.linear
        return HeadInput(values, linear.weight, linear.bias, self.head.scale, self.head.softcap)

    def _loss(self, result: Any, batch: Batch, positions: Tensor, teacher: TeacherOutputs | None) -> dict[str, Tensor]:
        """result: of _run. Where the two models read different tokens, they are compared at batch["aligned"]."""
        labels = batch["labels"]
        if self.head is None and teacher is None:
            return {"loss_sum": cross_entropy_sum(result.logits, labels)}
        values = (result.logits if self.head is None else result.last_hidden_state).flatten(0, -2)
        at_labels, counted = values[positions], labels.flatten()[positions]  # the others need not go through the head
        if teacher is None:
            return self.at_head(lambda: {"loss_sum": self.objective.cross_entropy(self._outputs(at_labels), counted)})
        aligned = values[batch["aligned"]] if self.objective.is_universal else None

        def sums() -> dict[str, Tensor]:
            others = None if aligned is None else self._outputs(aligned)
            kd = self.objective.loss(self._outputs(at_labels), counted, teacher, others)
            return {"loss_sum": kd.loss_sum, "ce_sum": kd.ce_sum, "divergence_sum": kd.divergence_sum}

        return sums() if self.head is None else self.at_head(sums)

    def _evaluated(
        self, values: Tensor, labels: Tensor, positions: Tensor, teacher: TeacherOutputs | None
    ) -> dict[str, Tensor]:
        """values: (N, V) logits, or (N, D) hidden states where the student has a head."""
        outputs, counted = self._outputs(values), labels.flatten()[positions]
        objective = self.objective.for_evaluation()
        predictions, confidences = argmax_labels(outputs)
        sums: dict[str, Tensor] = {}
        if teacher is None:
            sums["ce_sum"] = objective.cross_entropy(outputs, counted)
        else:
            kd = objective.loss(outputs, counted, teacher)
            agreed = self._agreed(values, predictions, teacher, objective)
            sums |= {"ce_sum": kd.ce_sum, "kl_sum": kd.divergence_sum, "agreed": agreed.sum()}
        shaped = torch.zeros_like(labels).flatten().index_copy_(0, positions, predictions).view_as(labels)
        return {**sums, "predictions": shaped, "confidences": confidences}

    def _agreed(self, values: Tensor, predictions: Tensor, teacher: TeacherOutputs, objective: Objective) -> Tensor:
        """Return, (N,) bool, where both models have the same argmax; one of several with the maximum is enough."""
        expected = teacher_argmax(teacher, objective)
        agreed = predictions == expected
        if "logits" in teacher:
            agreed |= tied_for_argmax(teacher["logits"], predictions)
        if self.head is None:
            agreed |= tied_for_argmax(values, expected)
        return agreed
