"""Transfer of self-attention relations: against the oracle, over masks, heads and pieces of a batch."""

from typing import Any

import loss_oracle
import pytest
import torch
from torch import Tensor

from forge.losses import feature_losses
from forge.losses.feature_losses import relation_loss


def problem(dtype: torch.dtype = torch.float64, B: int = 4, T: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Student of width 6, teacher of width 12, and a mask that keeps all, some, one and none of its rows' tokens."""
    g = torch.Generator().manual_seed(3)
    student = torch.randn(B, T, 6, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = (torch.randn(B, T, 12, generator=g, dtype=torch.float64) * 2).to(dtype)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0], mask[1, 1:4], mask[2, 3] = True, True, True
    return student, teacher, mask


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


@pytest.mark.parametrize("at_once", [1, 60, 2**24])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_value_and_gradient_equal_the_oracle(heads: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_losses, "RELATIONS_AT_ONCE", at_once)
    student, teacher, mask = problem()
    loss = relation_loss(student, teacher, mask, heads=heads)
    expected = loss_oracle.relation(student, teacher, mask, heads)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert torch.allclose(gradient_of(loss, student), gradient_of(expected, student), rtol=1e-9, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: relation_loss(x, teacher, mask, heads=heads), student)


def test_two_tokens_by_hand() -> None:
    """Student vectors of zeros relate evenly; a teacher of unit vectors e_1, e_2 by exp(1 / sqrt 2) to 1."""
    student, teacher = torch.zeros(1, 2, 2), torch.eye(2)[None]
    q = torch.tensor([0.5**0.5, 0.0]).softmax(0)
    expected = (q * (q / 0.5).log()).sum()
    assert relation_loss(student, teacher, torch.ones(1, 2, dtype=torch.bool), heads=1).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_equal_vectors_and_turned_ones_cost_nothing() -> None:
    """Relations see the vectors' angles and lengths and not their directions: a teacher turned is the same teacher."""
    student, _, mask = problem(torch.float32)
    loss = relation_loss(student, student.detach().clone(), mask, heads=3)
    assert loss.item() == 0
    assert gradient_of(loss, student).abs().max() == 0
    turned = student.detach().flip(-1)
    assert relation_loss(student, turned, mask, heads=1).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_what_stands_outside_the_mask_goes_nowhere(wild: float) -> None:
    student, teacher, mask = problem()
    expected = relation_loss(student, teacher, mask, heads=2)
    for whose in range(2):
        vectors = [student.detach().clone(), teacher.clone()]
        vectors[whose][~mask] = wild
        vectors[0].requires_grad_()
        loss = relation_loss(*vectors, mask, heads=2)
        found = gradient_of(loss, vectors[0])
        assert loss.item() == expected.item()
        assert torch.equal(found, gradient_of(expected, student))
        assert found[~mask].abs().max() == 0


def test_padding_changes_nothing() -> None:
    student, teacher, mask = problem()
    wide = [torch.cat([x, torch.ones(4, 3, x.shape[2]).double()], 1) for x in (student, teacher)]
    longer = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
    assert relation_loss(*wide, longer, heads=2).item() == pytest.approx(
        relation_loss(student, teacher, mask, heads=2).item(), rel=1e-12
    )


def test_pieces_of_a_batch_add_up_to_it() -> None:
    student, teacher, mask = problem()
    whole = relation_loss(student, teacher, mask, heads=2)
    parts = [slice(0, 1), slice(1, 4), slice(4, 4)]
    pieces = sum(relation_loss(student[p], teacher[p], mask[p], heads=2) for p in parts)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(gradient_of(pieces, student), gradient_of(whole, student), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, mask = problem(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_loss(student, teacher, mask, heads=2)
    expected = loss_oracle.relation(student, teacher, mask, 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradient_of(loss, student)
    assert found.dtype == dtype
    assert ((found - gradient_of(expected, student)).float().norm() / found.float().norm()).item() < 5e-3


def test_nothing_counted_gives_zero_and_the_teacher_no_gradient() -> None:
    student, teacher, mask = problem()
    teacher.requires_grad_()
    loss = relation_loss(student, teacher, mask & False, heads=2)
    assert loss.item() == 0
    assert gradient_of(loss, student).abs().max() == 0
    relation_loss(student, teacher, mask, heads=2).backward()
    assert teacher.grad is None
    with torch.no_grad():
        assert not relation_loss(student, teacher, mask, heads=2).requires_grad


def test_only_the_gradient_is_kept_for_backward() -> None:
    student, teacher, mask = problem(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        relation_loss(student, teacher, mask, heads=2)
    assert [(x.shape, x.dtype) for x in kept] == [(student.shape, torch.bfloat16)]


def test_what_does_not_agree_is_refused_in_one_sentence() -> None:
    student, teacher, mask = problem()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"heads": 4}, "heads must divide the student's width 6, got 4"),
        ({"student": student[..., :4], "heads": 0}, "heads must divide the student's width 4, got 0"),
        ({"teacher": teacher[..., :5]}, "heads must divide the teacher's width 5, got 2"),
        ({"teacher": teacher[:3]}, r"student \(4, 5, 6\) and teacher \(3, 5, 12\)"),
        ({"mask": mask[:, :2]}, r"mask \(4, 2\) torch.bool must be bool \(4, 5\)"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            relation_loss(**{"student": student, "teacher": teacher, "mask": mask, "heads": 2, **change})
        assert "\n" not in str(raised.value)
