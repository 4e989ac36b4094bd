"""The terms of the loss that match hidden states and self-attention relations of the student to the teacher's."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.config.teacher_schema import DistillationConfig, RelationsConfig
from forge.data.batches import Batch, model_inputs
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.losses.feature_losses import hidden_state_loss, relation_loss
from forge.model.attention import attention_modules, width_of
from forge.teacher.teacher import (
    Teacher,
    TeacherOutputs,
    hidden_state_options,
    hidden_states_of,
    hidden_widths,
    known_depth,
    layer_map,
)

logger = logging.getLogger(__name__)


class Features(nn.Module):
    """weight_h * hidden_sum + weight_r * relation_sum, as sums over the labels.

    With one label per row, a row gives the mean over its tokens; with labels at positions, hidden states are summed at
    these positions. Rows and positions without a label do not count.
    """

    def __init__(
        self,
        config: DistillationConfig,
        pairs: Mapping[int, int],
        projections: nn.ModuleDict,
        attention: Mapping[str, str],
    ):
        """Build the terms of a config.

        pairs: from a student's layer to the teacher's layer that it is matched to. projections: by projection_name, for
        pairs of different widths. attention: for each kind of vector, the student's module that computes it.
        """
        super().__init__()
        self.config, self.pairs, self.attention = config, dict(pairs), dict(attention)
        self.projections = projections
        self.options = hidden_state_options(list(self.pairs))  # of the student's forward

    def forward(
        self, result: Any, captured: dict[str, Tensor], batch: Batch, teacher: TeacherOutputs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum () float32, and its parts hidden_sum and relation_sum without weights and gradients.

        result: the output of the student's model, with hidden states. captured: the outputs of the modules of
        `attention` in that forward.
        """
        mask, positions = _counted(batch)
        total = torch.zeros((), device=mask.device)
        parts = {}
        with torch.autocast(mask.device.type, enabled=False):
            if self.config.hidden is not None:
                hidden_sum = self._hidden(hidden_states_of(result), mask, positions, teacher)
                total, parts["hidden_sum"] = total + self.config.hidden.weight * hidden_sum, hidden_sum.detach()
            if self.config.relations is not None:
                relation_sum = _relations(self.config.relations, captured, mask, teacher)
                total, parts["relation_sum"] = (
                    total + self.config.relations.weight * relation_sum,
                    relation_sum.detach(),
                )
        return total, parts

    def _hidden(
        self, states: tuple[Tensor, ...], mask: Tensor, positions: Tensor | None, teacher: TeacherOutputs
    ) -> Tensor:
        """Return the mean over the pairs.

        Vectors that do not count are set to 0 before the projection, in whose gradient 0 * NaN would be NaN.
        """
        assert self.config.hidden is not None
        kind, losses = self.config.hidden.kind, []
        for layer, of_teacher in self.pairs.items():
            name = projection_name(layer, of_teacher)
            vectors, target = states[layer], teacher[f"hidden_states.{of_teacher}"]  # (B, T, Ds), (B, T, Dt)
            if positions is None:
                vectors = torch.where(mask[..., None], vectors, 0.0)
            else:  # (1, N, …)
                vectors, target = (x.flatten(0, 1)[positions][None] for x in (vectors, target))
            if name in self.projections:
                projection = self.projections[name]
                assert isinstance(projection, nn.Linear)
                vectors = projection(vectors.to(projection.weight.dtype))
            if positions is None:
                losses.append(hidden_state_loss(vectors, target, mask, kind=kind, per="row"))
            else:
                everywhere = mask.new_ones(vectors.shape[:2])
                losses.append(hidden_state_loss(vectors, target, everywhere, kind=kind, per="position"))
        return torch.stack(losses).mean()


def check_features(config: DistillationConfig, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse what build_features would refuse, as far as configs show it without a forward: before a run exists."""
    if config.alpha == 0:
        return
    if config.hidden is not None:
        own, theirs = (known_depth(model.config) for model in (student, teacher))
        if own is not None and theirs is not None:
            layer_map(config.hidden.layers, own, theirs)
    if config.relations is not None:
        widths: dict[str, dict[str, int]] = {}
        for whose, model, layer in (
            ("student", student, config.relations.student_layer),
            ("teacher", teacher, config.relations.teacher_layer),
        ):
            found = attention_modules(model, layer, whose)
            widths[whose] = {str(kind): width_of(model, found[kind]) for kind in config.relations.of}
        _check_heads(config.relations.heads, widths)


def build_features(
    config: DistillationConfig,
    seed: int,
    model: PreTrainedModel,
    forward_options: dict[str, Any],
    teacher: Teacher,
    batch: Batch,
) -> Features | None:
    """Return the terms that the config asks for, or None, and request from the teacher what they need.

    batch: any batch, on the device. model: the student's, on the device or still in host memory. Raises UsageError if
    the models lack these layers, or if their widths do not fit.
    """
    if config.alpha == 0 or (config.hidden is None and config.relations is None):
        return None
    pairs: dict[int, int] = {}
    projections = nn.ModuleDict()
    if config.hidden is not None:
        own, theirs = _widths(model, batch, forward_options), teacher.hidden_widths(batch)
        pairs = layer_map(config.hidden.layers, len(own) - 1, len(theirs) - 1)
        projections = _projections(pairs, own, theirs, seed).to(model.device)
        teacher.layers = tuple(sorted(set(pairs.values())))
        matched = ", ".join(f"{layer} to {of_teacher}" for layer, of_teacher in pairs.items())
        count = sum(weight.numel() for weight in projections.parameters())
        logger.info("hidden states, student's layer to teacher's: %s; projections: %d weights", matched, count)
    attention: dict[str, str] = {}
    if config.relations is not None:
        found = attention_modules(model, config.relations.student_layer, "student")
        attention = {kind: found[kind] for kind in config.relations.of}
        widths = {kind: width_of(model, name) for kind, name in attention.items()}
        of_teacher = teacher.request_relations(config.relations.teacher_layer, list(attention))
        _check_heads(config.relations.heads, {"student": widths, "teacher": of_teacher})
    return Features(config, pairs, projections, attention)


def projection_name(layer: int, of_teacher: int) -> str:
    """Return the name of a pair's projection, also in checkpoints."""
    return f"{layer}_to_{of_teacher}"


def _projections(pairs: Mapping[int, int], own: tuple[int, ...], theirs: tuple[int, ...], seed: int) -> nn.ModuleDict:
    """Return projections for the pairs whose widths differ, in float32 and initialised as nn.Linear is.

    They depend on the seed alone, so all ranks have the same, and torch's global generator is not advanced.
    """
    generator = torch.Generator().manual_seed(seed)
    projections = nn.ModuleDict()
    for layer, of_teacher in pairs.items():
        if own[layer] != theirs[of_teacher]:
            linear = nn.utils.skip_init(nn.Linear, own[layer], theirs[of_teacher], bias=False, dtype=torch.float32)
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
            projections[projection_name(layer, of_teacher)] = linear
    return projections


def _widths(model: PreTrainedModel, batch: Batch, forward_options: dict[str, Any]) -> tuple[int, ...]:
    """Return the widths of the student's hidden states, from a forward in eval mode, which draws no random numbers."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return hidden_widths(model, send_to_device(model_inputs(batch), model.device), forward_options)
    finally:
        model.train(training)


def _check_heads(heads: int, widths: dict[str, dict[str, int]]) -> None:
    for whose, of_kinds in widths.items():
        for kind, width in of_kinds.items():
            if width % heads:
                raise UsageError(
                    f"distillation.relations.heads is {heads}, which does not divide {width}, the width of the "
                    f"{whose}'s {kind}; set it to a number that divides the widths of both models"
                )


def _counted(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return which vectors count, (B, T) bool, and if these are summed, not averaged by row, their positions (N,)."""
    labelled = batch["labels"] != IGNORE
    if labelled.dim() == 1:
        return batch["attention_mask"].bool() & labelled[:, None], None
    return labelled, batch["positions"]


def _relations(config: RelationsConfig, captured: dict[str, Tensor], mask: Tensor, teacher: TeacherOutputs) -> Tensor:
    """Return the mean over the kinds of vectors."""
    losses = [
        relation_loss(captured[kind], teacher[f"relations.{kind}"], mask, heads=config.heads) for kind in config.of
    ]
    return torch.stack(losses).mean()
