"""The loss between a student and its teacher at the label positions, whatever form either gives its logits in."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from forge.config.schema import LossConfig
from forge.config.teacher_schema import DistillationConfig
from forge.losses.cross_entropy import count_labels, cross_entropy_sum
from forge.losses.kd_arguments import Computing, Formula, HeadInput, KDLoss, TopK
from forge.losses.kd_settings import plain_rows
from forge.losses.linear_kd import linear_kd
from forge.losses.linear_kd_plain import head_logits
from forge.losses.logits_kd import logits_kd
from forge.losses.products import operand, product
from forge.losses.uld import linear_uld, logits_uld
from forge.teacher.teacher import TeacherOutputs

# What a student gives at N positions: logits (N, V), or hidden states (N, D) with the head that would make them.
StudentOutputs = Tensor | HeadInput


@dataclass(frozen=True)
class Objective:
    """loss = (1 - alpha) * CE + alpha * T^2 * D(teacher || student), as sums over the labels."""

    config: DistillationConfig = field(default_factory=DistillationConfig)
    logit_scale: float = 1.0  # of the teacher's head
    softcap: float | None = None  # of the teacher's head
    computing: LossConfig = field(default_factory=LossConfig)

    def for_evaluation(self) -> "Objective":
        """Return the one objective of all evaluations, so that runs trained with different ones can be compared.

        It is forward KL at temperature 1, with what a top k lacks as one more event, and without bf16 logits: two equal
        models are then at 0.
        """
        same = {"alpha": 0.5, "temperature": 1.0, "divergence": "forward_kl", "missing_mass": "tail"}
        exact = {"precision": None} if self.computing.precision == "bf16" else {}
        return replace(
            self, config=self.config.model_copy(update=same), computing=self.computing.model_copy(update=exact)
        )

    @property
    def is_universal(self) -> bool:
        """True if the models are compared at aligned positions, and not at the labels."""
        return self.config.divergence == "uld"

    def loss(
        self,
        student: StudentOutputs,
        labels: Tensor,
        teacher: TeacherOutputs,
        aligned: StudentOutputs | None = None,
    ) -> KDLoss:
        """Return the loss over labels (N,) int64.

        student: what the student gives at the labels. aligned: of a universal objective what it gives at the M
        positions of the teacher's outputs.
        """
        if "logits" in teacher:  # the teacher's head is not a single matrix, or its whole logits were cached
            student, aligned = whole_logits(student), None if aligned is None else whole_logits(aligned)
        if aligned is not None:
            return self._universal(student, labels, teacher, aligned)
        if isinstance(student, HeadInput):
            return linear_kd(student, self._teacher(teacher), labels, self._formula, self._computing)
        return logits_kd(student, teacher["logits"] if "logits" in teacher else _top_k(teacher), labels, self._formula)

    def cross_entropy(self, student: StudentOutputs, labels: Tensor) -> Tensor:
        """Return the cross-entropy summed over labels (N,), a scalar; of hidden states without all their logits."""
        if isinstance(student, Tensor):
            return cross_entropy_sum(student, labels)
        return linear_kd(student, None, labels, Formula(alpha=0.0), self._computing).loss_sum

    def teacher_input(self, teacher: TeacherOutputs) -> HeadInput:
        """Return a teacher's hidden states with its head."""
        return HeadInput(teacher["hidden"], teacher["head"], teacher.get("head_bias"), self.logit_scale, self.softcap)

    def _teacher(self, teacher: TeacherOutputs) -> HeadInput | TopK:
        return _top_k(teacher) if "top_indices" in teacher else self.teacher_input(teacher)

    def _universal(
        self, student: StudentOutputs, labels: Tensor, teacher: TeacherOutputs, aligned: StudentOutputs
    ) -> KDLoss:
        """The distance is a sum over the aligned positions, which are fewer than the labels."""
        alpha, T = self.config.alpha, self.config.temperature
        if isinstance(aligned, HeadInput):
            distance = linear_uld(aligned, self.teacher_input(teacher), temperature=T)
        else:
            distance = logits_uld(aligned, teacher["logits"], temperature=T)
        ce_sum = self.cross_entropy(student, labels)
        loss_sum = (1.0 - alpha) * ce_sum + alpha * T**2 * distance
        return KDLoss(loss_sum, ce_sum.detach(), distance.detach(), count_labels(labels))

    @property
    def _formula(self) -> Formula:
        config = self.config
        return Formula(
            config.alpha, config.temperature, config.divergence, config.beta, config.skew, config.missing_mass
        )

    @property
    def _computing(self) -> Computing:
        gib = self.computing.memory_budget_gib
        budget = None if gib is None else int(gib * 2**30)
        return Computing(self.computing.precision, budget, self.computing.low_memory)


def argmax_labels(student: StudentOutputs) -> tuple[Tensor, Tensor]:
    """Return the most probable label of each position, (N,) int64, and its probability, (N,) float32."""
    best, confidences = [], []
    pieces = _pieces(student) if isinstance(student, HeadInput) else student.split(_rows(student.shape[1]))
    for piece in pieces:
        logits = piece if isinstance(student, HeadInput) else piece.float()
        highest, at = logits.max(dim=-1)
        best.append(at)
        confidences.append((highest - logits.logsumexp(dim=-1)).exp().float())
    return torch.cat(best), torch.cat(confidences)


def teacher_argmax(teacher: TeacherOutputs, objective: Objective) -> Tensor:
    """Return the teacher's most probable class or token at each label position, (N,) int64."""
    if "top_indices" in teacher:
        best = teacher["top_log_probs"].argmax(dim=-1, keepdim=True)
        return teacher["top_indices"].gather(1, best).squeeze(1)
    if "logits" in teacher:
        return teacher["logits"].argmax(dim=-1)
    return torch.cat([logits.argmax(dim=-1) for logits in _pieces(objective.teacher_input(teacher))])


def tied_for_argmax(logits: Tensor, columns: Tensor) -> Tensor:
    """Return, (N,) bool, whether no column of logits (N, V) has more than this one (N,); False for a missing column.

    In half precision several columns can have the maximum, and which of them comes first says nothing.
    """
    there = columns < logits.shape[1]
    chosen = logits.gather(1, torch.where(there, columns, 0)[:, None]).squeeze(1)
    return there & (chosen == logits.amax(dim=-1))


def whole_logits(student: StudentOutputs) -> Tensor:
    """Return logits (N, V), of hidden states in float32 (float64 stays) also under autocast, with their gradients."""
    if isinstance(student, Tensor):
        return student
    dtype = torch.promote_types(torch.promote_types(student.hidden.dtype, student.weight.dtype), torch.float32)
    with torch.autocast(student.hidden.device.type, enabled=False):
        raw = student.hidden.to(dtype) @ student.weight.to(dtype).T
        return head_logits(raw, student.bias, student.scale, student.softcap or 0.0)[0]


def _top_k(teacher: TeacherOutputs) -> TopK:
    return TopK(teacher["top_log_probs"], teacher["top_indices"])


def _pieces(given: HeadInput) -> Iterator[Tensor]:
    """Yield the logits of some rows at a time, (n, V) in float32, or float64, whatever the dtypes are.

    In bf16 one row in twenty of 20,000 columns has two columns with the maximum.
    """
    dtype = torch.promote_types(given.hidden.dtype, given.weight.dtype)
    weight = operand(given.weight, dtype)  # once: it may be a copy
    for part in given.hidden.split(_rows(len(given.weight))):
        with torch.autocast(given.hidden.device.type, enabled=False):
            raw = product(operand(part, dtype), weight.T)
            logits, _ = head_logits(raw, given.bias, given.scale, given.softcap or 0.0)
        yield logits


def _rows(columns: int) -> int:
    return plain_rows(columns, 4)
