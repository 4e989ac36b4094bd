"""The loss between a student and its teacher at the label positions, whatever form either gives its logits in."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from forge.config.distilling import DistillationConfig
from forge.losses.cross_entropy import IGNORE, count_labels, cross_entropy_sum
from forge.losses.linear_kd import Parts, linear_kd
from forge.losses.logits_kd import logits_kd
from forge.losses.uld import linear_uld, logits_uld
from forge.model.head import LinearHead
from forge.teacher.teacher import TeacherOutputs


@dataclass(frozen=True)
class Objective:
    """loss = (1 - alpha) * CE + alpha * T^2 * D(teacher || student), as sums over the labels."""

    config: DistillationConfig
    logit_scale: float = 1.0  # the teacher's, of what its hidden states and head give
    softcap: float | None = None

    def of_evaluation(self) -> "Objective":
        """Forward KL at temperature 1, of a top k with all other tokens as one, whatever is trained with: runs that
        differ in it can then be compared."""
        same = {"alpha": 0.5, "temperature": 1.0, "divergence": "forward_kl", "missing_mass": "tail"}
        return replace(self, config=self.config.model_copy(update=same))

    @property
    def is_universal(self) -> bool:
        """Are the two compared where they are aligned, and not at the labels?"""
        return self.config.divergence == "uld"

    def from_logits(
        self, logits: Tensor, labels: Tensor, teacher: TeacherOutputs, aligned: Tensor | None = None
    ) -> tuple[Tensor, Parts]:
        """logits: (N, V); labels: (N,) int64; teacher: logits, or a top k; aligned: for uld the logits (M, V) at the
        places of the teacher's. Returns the sum and its parts."""
        if aligned is not None:
            distance = logits_uld(aligned, teacher["logits"], temperature=self.config.temperature)
            return self._universal(cross_entropy_sum(logits, labels), distance, labels)
        return logits_kd(
            logits,
            teacher.get("logits"),
            labels,
            **self._sparse(teacher),
            **self._formula(),
            ignore_index=IGNORE,
            normalizer=torch.ones((), device=logits.device),
        )

    def from_hidden(
        self,
        head: LinearHead,
        hidden: Tensor,
        labels: Tensor,
        teacher: TeacherOutputs,
        aligned: Tensor | None = None,
    ) -> tuple[Tensor, Parts]:
        """hidden: (N, D), with the student's head; labels: (N,) int64; aligned: for uld the hidden states (M, D) at the
        places of the teacher's. Returns the sum and its parts."""
        if "logits" in teacher:  # the teacher's head is no matrix alone, or its whole logits were kept
            at_aligned = None if aligned is None else head.logits(aligned)
            return self.from_logits(head.logits(hidden), labels, teacher, at_aligned)
        if aligned is not None:
            distance = linear_uld(
                aligned,
                head.linear.weight,
                teacher["hidden"],
                teacher["head"],
                temperature=self.config.temperature,
                student_bias=head.linear.bias,
                teacher_bias=teacher.get("head_bias"),
                logit_scale=head.scale,
                softcap=head.softcap,
                teacher_logit_scale=self.logit_scale,
                teacher_softcap=self.softcap,
            )
            return self._universal(linear_ce(head, hidden, labels), distance, labels)
        return linear_kd(
            hidden,
            head.linear.weight,
            labels,
            teacher_hidden=teacher.get("hidden"),
            teacher_head=teacher.get("head"),
            teacher_bias=teacher.get("head_bias"),
            teacher_logit_scale=self.logit_scale,
            teacher_softcap=self.softcap,
            student_bias=head.linear.bias,
            logit_scale=head.scale,
            softcap=head.softcap,
            **self._sparse(teacher),
            **self._formula(),
            ignore_index=IGNORE,
            normalizer=torch.ones((), device=hidden.device),
        )

    def _universal(self, ce_sum: Tensor, distance: Tensor, labels: Tensor) -> tuple[Tensor, Parts]:
        """distance: the sum over the aligned places, which are fewer than the labels: the others give no signal."""
        config = self.config
        loss = (1.0 - config.alpha) * ce_sum + config.alpha * config.temperature**2 * distance
        return loss, Parts(ce_sum.detach(), distance.detach(), count_labels(labels))

    def _formula(self) -> dict[str, Any]:
        config = self.config
        names = ("alpha", "temperature", "divergence", "beta", "skew")
        return {name: getattr(config, name) for name in names}

    def _sparse(self, teacher: TeacherOutputs) -> dict[str, Any]:
        if "top_log_probs" not in teacher:
            return {}
        return {
            "teacher_log_probs": teacher["top_log_probs"],
            "teacher_indices": teacher["top_indices"],
            "missing_mass": self.config.missing_mass,
        }


def linear_ce(head: LinearHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy, summed over labels (N,), of hidden states (N, D) and their head; no logits of all of them."""
    ce_sum, _ = linear_kd(
        hidden,
        head.linear.weight,
        labels,
        student_bias=head.linear.bias,
        alpha=0.0,
        logit_scale=head.scale,
        softcap=head.softcap,
        ignore_index=IGNORE,
        normalizer=torch.ones((), device=hidden.device),
    )
    return ce_sum


def likeliest(teacher: TeacherOutputs, objective: Objective, rows: int) -> Tensor:
    """(N,) int64: the teacher's likeliest class or token at each label position, `rows` of its logits at a time."""
    if "top_indices" in teacher:
        best = teacher["top_log_probs"].argmax(dim=-1, keepdim=True)
        return teacher["top_indices"].gather(1, best).squeeze(1)
    if "logits" in teacher:
        return teacher["logits"].argmax(dim=-1)
    head, bias = teacher["head"], teacher.get("head_bias")
    sign = math.copysign(1.0, objective.logit_scale)  # beside that no scale and no softcap changes an order
    with torch.autocast(head.device.type, enabled=False):
        pieces = [(linear(part, head, bias) * sign).argmax(dim=-1) for part in teacher["hidden"].split(rows)]
    return torch.cat(pieces)
