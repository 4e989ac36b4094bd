"""Losses between hidden states: against the oracle, what a masked-out position may hold, and the sums over pieces."""

from typing import Any

import loss_oracle
import pytest
import torch
from torch import Tensor

from forge.losses.feature_losses import hidden_state_loss

CASES = [(kind, per) for kind in ("mse", "cosine") for per in ("row", "position")]


def problem(dtype: torch.dtype = torch.float64, B: int = 4, T: int = 5, D: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, and a mask that keeps all, some, one and none of its rows' positions."""
    g = torch.Generator().manual_seed(2)
    student = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = (torch.randn(B, T, D, generator=g, dtype=torch.float64) * 2).to(dtype)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0], mask[1, 1:4], mask[2, 3] = True, True, True
    return student, teacher, mask


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


@pytest.mark.parametrize(("kind", "per"), CASES)
def test_value_and_gradient_equal_the_oracle(kind: str, per: str) -> None:
    student, teacher, mask = problem()
    loss = hidden_state_loss(student, teacher, mask, kind=kind, per=per)
    expected = loss_oracle.hidden_state(student, teacher, mask, kind, per)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient_of(loss, student), gradient_of(expected, student), rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: hidden_state_loss(x, teacher, mask, kind=kind, per=per), student)


def test_the_reductions_by_hand() -> None:
    student, teacher = torch.zeros(2, 3, 2), torch.tensor([1.0, 3.0]).expand(2, 3, 2)  # 5 at each position
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert hidden_state_loss(student, teacher, mask, kind="mse", per="position").item() == 20
    assert hidden_state_loss(student, teacher, mask, kind="mse", per="row").item() == 10
    opposite = torch.tensor([-2.0, -6.0]).expand(2, 3, 2)
    assert hidden_state_loss(opposite, teacher, mask, kind="cosine", per="position").item() == pytest.approx(8)


@pytest.mark.parametrize(("kind", "per"), CASES)
def test_equal_states_cost_nothing(kind: str, per: str) -> None:
    student, _, mask = problem(torch.float32)
    loss = hidden_state_loss(student, student.detach().clone(), mask, kind=kind, per=per)
    assert loss.item() == 0
    assert gradient_of(loss, student).abs().max() == 0


def test_cosine_does_not_see_length_and_mse_does() -> None:
    student, _, mask = problem()
    longer = student.detach() * 3
    assert hidden_state_loss(student, longer, mask, kind="cosine", per="row").item() < 1e-15
    assert hidden_state_loss(student, longer, mask, kind="mse", per="row").item() > 1


@pytest.mark.parametrize(("kind", "per"), CASES)
@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_what_stands_outside_the_mask_goes_nowhere(kind: str, per: str, wild: float) -> None:
    student, teacher, mask = problem()
    expected = hidden_state_loss(student, teacher, mask, kind=kind, per=per)
    for whose in range(2):
        states = [student.detach().clone(), teacher.clone()]
        states[whose][~mask] = wild
        states[0].requires_grad_()
        loss = hidden_state_loss(*states, mask, kind=kind, per=per)
        found = gradient_of(loss, states[0])
        assert loss.item() == expected.item()
        assert torch.equal(found, gradient_of(expected, student))
        assert found[~mask].abs().max() == 0


@pytest.mark.parametrize(("kind", "per"), CASES)
def test_pieces_of_a_batch_add_up_to_it(kind: str, per: str) -> None:
    student, teacher, mask = problem()
    whole = hidden_state_loss(student, teacher, mask, kind=kind, per=per)
    parts = [slice(0, 1), slice(1, 4), slice(4, 4)]
    pieces = sum(hidden_state_loss(student[p], teacher[p], mask[p], kind=kind, per=per) for p in parts)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient_of(pieces, student), gradient_of(whole, student), rtol=1e-12)


@pytest.mark.parametrize(("kind", "per"), CASES)
def test_half_precision_is_computed_in_float32(kind: str, per: str) -> None:
    student, teacher, mask = problem(torch.bfloat16, D=512)
    loss = hidden_state_loss(student, teacher, mask, kind=kind, per=per)
    expected = loss_oracle.hidden_state(student, teacher, mask, kind, per)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradient_of(loss, student)
    assert found.dtype == torch.bfloat16
    assert ((found - gradient_of(expected, student)).float().norm() / found.float().norm()).item() < 4e-3


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_nothing_counted_and_vectors_of_zeros_make_no_nan(kind: str) -> None:
    student, teacher, mask = problem()
    loss = hidden_state_loss(student, teacher, mask & False, kind=kind, per="row")
    assert loss.item() == 0
    assert gradient_of(loss, student).abs().max() == 0
    zero = torch.zeros_like(student).requires_grad_()
    loss = hidden_state_loss(zero, teacher, mask, kind=kind, per="row")
    assert loss.isfinite()
    assert gradient_of(loss, zero).isfinite().all()
    assert hidden_state_loss(zero, teacher * 0, mask, kind=kind, per="row").item() == 0


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, mask = problem()
    teacher.requires_grad_()
    hidden_state_loss(student, teacher, mask, kind="mse", per="row").backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_what_does_not_agree_is_refused_in_one_sentence() -> None:
    student, teacher, mask = problem()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher": teacher[..., :4]}, r"student \(4, 5, 6\) and teacher \(4, 5, 4\) .* project the student"),
        ({"student": student[0], "teacher": teacher[0]}, "one shape"),
        ({"mask": mask[:2]}, r"mask \(2, 5\) torch.bool must be bool \(4, 5\)"),
        ({"mask": mask.long()}, "torch.int64 must be bool"),
        ({"kind": "l1"}, "kind must be mse or cosine"),
        ({"per": "batch"}, "per row or position"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            hidden_state_loss(
                **{"student": student, "teacher": teacher, "mask": mask, "kind": "mse", "per": "row", **change}
            )
        assert "\n" not in str(raised.value)
