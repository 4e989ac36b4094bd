"""The distillation loss from whole logits: against the oracle, plain SFT to the bit, and what memory it takes."""

from typing import Any

import loss_oracle
import pytest
import torch
from kd_calls import flat_logits_kd
from loss_oracle import DIVERGENCES, IGNORE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forge.losses.cross_entropy import cross_entropy_sum

ONE = torch.tensor(1.0)


def problem(
    N: int = 10, V: int = 7, Vt: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits that ask for a gradient, teacher logits, labels with every fourth ignored."""
    g = torch.Generator().manual_seed(1)
    student = (torch.randn(N, V, generator=g, dtype=torch.float64) * 2).to(dtype).requires_grad_()
    teacher = (torch.randn(N, Vt or V, generator=g, dtype=torch.float64) * 3).to(dtype)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::4] = IGNORE
    return student, teacher, labels


def oracle(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, T: float, name: str, parameter: float
) -> tuple[float, float, float, Tensor]:
    """Loss sum, CE sum, D sum and the loss sum's gradient."""
    student = student.detach().double().requires_grad_()
    rows = [i for i, label in enumerate(labels.tolist()) if label != IGNORE]
    ce = sum(loss_oracle.cross_entropy(student[i], int(labels[i])) for i in rows)
    kl = sum(loss_oracle.divergence(name, student[i], teacher[i], T, parameter) for i in rows)
    total = (1 - alpha) * ce + alpha * T**2 * kl
    total.backward()
    return total.item(), ce.item(), kl.item(), student.grad


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("rows", [None, 1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_loss_sums_and_gradient_equal_the_oracle(
    name: str, parameter: float, temperature: float, rows: int | None
) -> None:
    student, teacher, labels = problem()
    loss, parts = flat_logits_kd(
        student, teacher, labels, alpha=0.4, temperature=temperature, divergence=name, beta=parameter, skew=parameter,
        rows=rows,
    )  # fmt: skip
    total, ce, kl, gradient = oracle(student, teacher, labels, 0.4, temperature, name, parameter)
    assert parts.count.item() == 7
    assert loss.item() == pytest.approx(total / 7)
    assert (parts.ce_sum.item(), parts.divergence_sum.item()) == (pytest.approx(ce), pytest.approx(kl))
    assert error(gradient_of(loss, student), gradient / 7) < 1e-12


@pytest.mark.parametrize("Vt", [5, 9])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_columns_that_only_one_model_has_are_left_out_of_the_divergence(name: str, parameter: float, Vt: int) -> None:
    student, teacher, labels = problem(Vt=Vt)
    loss, parts = flat_logits_kd(
        student, teacher, labels, alpha=0.4, temperature=2.0, divergence=name, beta=parameter, skew=parameter,
        normalizer=ONE,
    )  # fmt: skip
    total, ce, kl, gradient = oracle(student, teacher, labels, 0.4, 2.0, name, parameter)
    assert loss.item() == pytest.approx(total)
    assert (parts.ce_sum.item(), parts.divergence_sum.item()) == (pytest.approx(ce), pytest.approx(kl))
    assert error(gradient_of(loss, student), gradient) < 1e-12


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("missing_mass", ["tail", "renormalise", "zero"])
def test_a_top_k_teacher(missing_mass: str, rows: int | None) -> None:
    student, teacher, labels = problem()
    log_q, indices = (teacher / 2.0).log_softmax(-1).topk(3)
    loss, parts = flat_logits_kd(
        student, None, labels, teacher_log_probs=log_q, teacher_indices=indices, missing_mass=missing_mass, alpha=1.0,
        temperature=2.0, normalizer=ONE, rows=rows,
    )  # fmt: skip
    again = student.detach().clone().requires_grad_()
    kl = sum(
        loss_oracle.sparse_kl(again[i], log_q[i], indices[i], 2.0, missing_mass)
        for i in range(10)
        if labels[i] != IGNORE
    )
    assert parts.divergence_sum.item() == pytest.approx(kl.item())
    assert loss.item() == pytest.approx(4 * kl.item())
    assert error(gradient_of(loss, student), gradient_of(4 * kl, again)) < 1e-12


@pytest.mark.parametrize("ignore_index", [IGNORE, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_zero_is_supervised_training_to_the_last_bit(dtype: torch.dtype, ignore_index: int) -> None:
    student, teacher, labels = problem(N=64, V=33, dtype=dtype)
    labels = torch.where(labels == IGNORE, ignore_index, labels)
    normalizer = torch.tensor(37)
    loss, parts = flat_logits_kd(
        student, teacher, labels, alpha=0.0, temperature=3.0, normalizer=normalizer, ignore_index=ignore_index
    )
    supervised = cross_entropy_sum(student, torch.where(labels == ignore_index, IGNORE, labels))
    assert torch.equal(loss, supervised / normalizer)
    assert torch.equal(parts.ce_sum, supervised.detach())
    assert parts.divergence_sum.item() == 0
    found = gradient_of(loss, student)
    assert found.dtype == dtype
    assert torch.equal(found, gradient_of(supervised / normalizer, student))
    alone, _ = flat_logits_kd(student, None, labels, alpha=0.0, normalizer=normalizer, ignore_index=ignore_index)
    assert torch.equal(alone, loss)


def test_alpha_one_still_reports_cross_entropy() -> None:
    student, teacher, labels = problem()
    loss, parts = flat_logits_kd(student, teacher, labels, alpha=1.0, temperature=2.0, normalizer=ONE)
    _, ce, kl, _ = oracle(student, teacher, labels, 1.0, 2.0, "forward_kl", 0.0)
    assert parts.ce_sum.item() == pytest.approx(ce)
    assert not parts.ce_sum.requires_grad
    assert loss.item() == pytest.approx(4 * kl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_rounded_only_where_they_enter_and_leave(dtype: torch.dtype) -> None:
    student, teacher, labels = problem(N=64, V=50, dtype=dtype)
    loss, parts = flat_logits_kd(student, teacher, labels, alpha=0.4, temperature=2.0)
    total, _, _, gradient = oracle(student, teacher, labels, 0.4, 2.0, "forward_kl", 0.0)
    assert (loss.dtype, gradient_of(loss, student).dtype) == (torch.float32, dtype)
    assert loss.item() == pytest.approx(total / parts.count.item(), rel=1e-5)
    assert error(gradient_of(loss, student), gradient / parts.count.item()) < 4e-3


def test_a_float16_gradient_waits_in_float32_for_the_loss_scale() -> None:
    """1e-9 is nothing in float16, and 65,536 times that is something."""
    student = torch.tensor([[0.0, 0.0, -20.0]], dtype=torch.float16, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -30.0]], dtype=torch.float16)
    loss, _ = flat_logits_kd(student, teacher, torch.tensor([0]), alpha=1.0)
    expected = 65536 * (student.float().softmax(-1) - teacher.float().softmax(-1))[0, 2].item()
    assert gradient_of(65536 * loss, student)[0, 2].item() == pytest.approx(expected, rel=1e-2)


def test_pieces_add_up_to_the_batch_and_a_batch_may_run_backward_twice() -> None:
    student, teacher, labels = problem()
    count = (labels != IGNORE).sum()
    options: dict[str, Any] = {"alpha": 0.4, "temperature": 2.0, "normalizer": count}
    loss, _ = flat_logits_kd(student, teacher, labels, **options)
    pieces = sum(
        flat_logits_kd(student[p], teacher[p], labels[p], **options)[0]
        for p in (slice(0, 1), slice(1, 4), slice(4, 10))
    )
    assert pieces.item() == pytest.approx(loss.item())
    first, second = gradient_of(loss, student), gradient_of(3 * loss, student)
    assert torch.allclose(gradient_of(pieces, student), first, rtol=1e-12)
    assert torch.allclose(second, 3 * first, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_nothing_counted_and_no_rows_give_zero_and_zero_gradients(alpha: float) -> None:
    student, teacher, labels = problem()
    for rows, kept in ((labels * 0 + IGNORE, slice(None)), (labels, slice(0, 0))):
        loss, parts = flat_logits_kd(student[kept], teacher[kept], rows[kept], alpha=alpha)
        assert (loss.item(), parts.ce_sum.item(), parts.divergence_sum.item(), parts.count.item()) == (0.0, 0.0, 0.0, 0)
        assert gradient_of(loss, student).abs().max() == 0


def test_nan_in_an_ignored_row_goes_nowhere() -> None:
    student, teacher, labels = problem()
    expected, _ = flat_logits_kd(student, teacher, labels)
    wild, wild_teacher = student.detach().clone(), teacher.clone()
    wild[0], wild_teacher[4] = torch.nan, torch.nan
    wild.requires_grad_()
    loss, _ = flat_logits_kd(wild, wild_teacher, labels)
    assert loss.item() == expected.item()
    assert torch.equal(gradient_of(loss, wild), gradient_of(expected, student))


def test_the_teacher_gets_no_gradient_and_evaluation_no_graph() -> None:
    student, teacher, labels = problem()
    teacher.requires_grad_()
    loss, _ = flat_logits_kd(student, teacher, labels)
    loss.backward()
    assert teacher.grad is None
    with torch.no_grad():
        evaluated, _ = flat_logits_kd(student, teacher, labels)
    assert (evaluated.item(), evaluated.requires_grad) == (loss.item(), False)
    assert not flat_logits_kd(student.detach(), teacher, labels)[0].requires_grad


class Widest(TorchDispatchMode):
    """The most elements that any float32 tensor had which was made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("sparse", [False, True])
def test_no_float32_tensor_is_as_large_as_the_logits_and_one_gradient_is_kept(sparse: bool) -> None:
    N, V = 64, 500
    student, teacher, labels = problem(N, V, dtype=torch.bfloat16)
    log_q, indices = teacher.float().log_softmax(-1).topk(8)
    teachers: dict[str, Any] = {"teacher": teacher}
    if sparse:
        teachers = {"teacher": None, "teacher_log_probs": log_q, "teacher_indices": indices}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), Widest() as widest:
        loss, _ = flat_logits_kd(student, labels=labels, **teachers, temperature=2.0, rows=4)
        assert 4 * V <= widest.elements < 5 * V
    assert [(x.shape, x.dtype) for x in kept if x.numel() > 1] == [((N, V), torch.bfloat16)]
    assert gradient_of(loss, student).shape == (N, V)


def test_what_does_not_agree_is_refused_in_one_sentence() -> None:
    student, teacher, labels = problem()
    log_q, indices = teacher.log_softmax(-1).topk(3)
    sparse = {"teacher_log_probs": log_q, "teacher_indices": indices}
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((student, None, labels), {}, "alpha > 0 needs a teacher: logits or TopK"),
        ((student, teacher[:3], labels), {}, r"teacher \(3, 7\) must be .* student \(10, 7\)"),
        ((student, teacher, labels[:3]), {}, r"labels \(3,\) torch.int64 must be .* student \(10, 7\)"),
        ((student, teacher, labels.float()), {}, "must be int64"),
        ((student, None, labels), {**sparse, "teacher_indices": indices[:, :2]}, "must have one shape"),
        ((student, None, labels), {n: x[:4] for n, x in sparse.items()}, "the student's 10 rows"),
        ((student, None, labels), {**sparse, "divergence": "tvd"}, "A top-k teacher supports forward_kl only"),
        ((student, teacher, labels), {"temperature": 0.0}, "temperature must be a positive number"),
        ((student, teacher, labels), {"divergence": "skew_reverse_kl", "skew": 1.0}, "skew of skew_reverse_kl"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            flat_logits_kd(*arguments, **options)
        assert "\n" not in str(raised.value)
