"""The loss between a student and its teacher at the label positions, whatever form either gives its logits in."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from forge.config.schema import LossConfig
from forge.config.teacher_schema import DistillationConfig
from forge.losses.cross_entropy import IGNORE, count_labels, cross_entropy_sum
from forge.losses.kd_settings import plain_rows
from forge.losses.linear_kd import Parts, linear_kd
from forge.losses.linear_kd_plain import head_logits
from forge.losses.logits_kd import logits_kd
from forge.losses.products import operand, product
from forge.losses.uld import linear_uld, logits_uld
from forge.model.head import LinearHead
from forge.teacher.teacher import TeacherOutputs


@dataclass(frozen=True)
class Objective:
    """loss = (1 - alpha) * CE + alpha * T^2 * D(teacher || student), as sums over the labels."""

    config: DistillationConfig = field(default_factory=DistillationConfig)
    logit_scale: float = 1.0  # the teacher's, of what its hidden states and head give
    softcap: float | None = None
    computing: LossConfig = field(default_factory=LossConfig)

    def of_evaluation(self) -> "Objective":
        """Forward KL at temperature 1, what a top k lacks as one more event, and no bf16 logits, whatever is trained
        with: runs that differ in it can then be compared, and two equal models are at 0."""
        same = {"alpha": 0.5, "temperature": 1.0, "divergence": "forward_kl", "missing_mass": "tail"}
        exact = {"precision": None} if self.computing.precision == "bf16" else {}
        return replace(
            self, config=self.config.model_copy(update=same), computing=self.computing.model_copy(update=exact)
        )

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
            at_aligned = None if aligned is None else _whole(head, aligned)
            return self.from_logits(_whole(head, hidden), labels, teacher, at_aligned)
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
            return self._universal(self.cross_entropy(head, hidden, labels), distance, labels)
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
            **self._computing(),
            ignore_index=IGNORE,
            normalizer=torch.ones((), device=hidden.device),
        )

    def cross_entropy(self, head: LinearHead, hidden: Tensor, labels: Tensor) -> Tensor:
        """CE alone, summed over labels (N,), of hidden states (N, D) and their head; no logits of all of them."""
        ce_sum, _ = linear_kd(
            hidden,
            head.linear.weight,
            labels,
            student_bias=head.linear.bias,
            alpha=0.0,
            logit_scale=head.scale,
            softcap=head.softcap,
            **self._computing(),
            ignore_index=IGNORE,
            normalizer=torch.ones((), device=hidden.device),
        )
        return ce_sum

    def _universal(self, ce_sum: Tensor, distance: Tensor, labels: Tensor) -> tuple[Tensor, Parts]:
        """distance: the sum over the aligned places, which are fewer than the labels: the others give no signal."""
        config = self.config
        loss = (1.0 - config.alpha) * ce_sum + config.alpha * config.temperature**2 * distance
        return loss, Parts(ce_sum.detach(), distance.detach(), count_labels(labels))

    def _formula(self) -> dict[str, Any]:
        config = self.config
        names = ("alpha", "temperature", "divergence", "beta", "skew")
        return {name: getattr(config, name) for name in names}

    def _computing(self) -> dict[str, Any]:
        gib = self.computing.memory_budget_gib
        return {
            "memory_budget": None if gib is None else int(gib * 2**30),
            "low_memory": self.computing.low_memory,
            "precision": self.computing.precision,
        }

    def _sparse(self, teacher: TeacherOutputs) -> dict[str, Any]:
        if "top_log_probs" not in teacher:
            return {}
        return {
            "teacher_log_probs": teacher["top_log_probs"],
            "teacher_indices": teacher["top_indices"],
            "missing_mass": self.config.missing_mass,
        }


def likeliest(values: Tensor, head: LinearHead | None) -> tuple[Tensor, Tensor]:
    """Of (N, V) logits, or of (N, D) hidden states with their head: (N,) int64, and their probabilities, float32."""
    best, confidences = [], []
    if head is None:
        pieces: Iterator[Tensor] = (part.float() for part in values.split(_rows(values.shape[1])))
    else:
        pieces = _pieces(values, head.linear.weight, head.linear.bias, head.scale, head.softcap)
    for logits in pieces:
        highest, at = logits.max(dim=-1)
        best.append(at)
        confidences.append((highest - logits.logsumexp(dim=-1)).exp().float())
    return torch.cat(best), torch.cat(confidences)


def teachers_likeliest(teacher: TeacherOutputs, objective: Objective) -> Tensor:
    """(N,) int64: the teacher's likeliest class or token at each label position."""
    if "top_indices" in teacher:
        best = teacher["top_log_probs"].argmax(dim=-1, keepdim=True)
        return teacher["top_indices"].gather(1, best).squeeze(1)
    if "logits" in teacher:
        return teacher["logits"].argmax(dim=-1)
    of_logits = teacher["head"], teacher.get("head_bias"), objective.logit_scale, objective.softcap
    return torch.cat([logits.argmax(dim=-1) for logits in _pieces(teacher["hidden"], *of_logits)])


def among_likeliest(logits: Tensor, columns: Tensor) -> Tensor:
    """(N,) bool: has no column of logits (N, V) more than this one (N,)? Columns that they do not have: no.

    In half precision several have the most, and which of them comes first says nothing.
    """
    there = columns < logits.shape[1]
    chosen = logits.gather(1, torch.where(there, columns, 0)[:, None]).squeeze(1)
    return there & (chosen == logits.amax(dim=-1))


def _whole(head: LinearHead, hidden: Tensor) -> Tensor:
    """(N, V) logits of hidden states (N, D), in float32 (float64 stays) also under autocast, with their gradients."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.linear.weight.dtype), torch.float32)
    bias = head.linear.bias
    with torch.autocast(hidden.device.type, enabled=False):
        raw = hidden.to(dtype) @ head.linear.weight.to(dtype).T
        return head_logits(raw, bias, head.scale, head.softcap or 0.0)[0]


def _pieces(hidden: Tensor, head: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Iterator[Tensor]:
    """The logits of hidden (N, D), some rows at a time: (n, V) in float32, or float64, whatever the dtypes are.

    In bf16 one row in twenty of 20,000 columns has two likeliest ones.
    """
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    wider = operand(head, dtype)  # once: it may be a copy
    for part in hidden.split(_rows(len(head))):
        with torch.autocast(hidden.device.type, enabled=False):
            logits, _ = head_logits(product(operand(part, dtype), wider.T), bias, scale, softcap or 0.0)
        yield logits


def _rows(columns: int) -> int:
    return plain_rows(columns, 4)
