"""Universal logit distillation: against the oracle, over vocabularies that have nothing in common."""

from typing import Any

import loss_oracle
import pytest
import torch
from kd_calls import flat_linear_kd, flat_linear_uld
from torch import Tensor

from forge.losses.products import in_range_of, restored
from forge.losses.uld import logits_uld


def problem(dtype: torch.dtype = torch.float64, V: int = 13, Vt: int = 9, M: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = {
        "student_hidden": normal(M, 5),
        "student_head": normal(V, 5),
        "teacher_hidden": normal(M, 7),
        "teacher_head": normal(Vt, 7),
        "student_bias": normal(V),
        "teacher_bias": normal(Vt),
    }
    return {name: t.to(dtype).requires_grad_(name.startswith("student")) for name, t in x.items()}


def oracle(x: dict[str, Tensor], T: float, scale: float = 1.0, cap: float | None = None) -> tuple[Tensor, list[Tensor]]:
    """The value, and its gradients in the student's hidden states, head and bias."""
    x = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in x.items()}

    def logits(whose: str) -> Tensor:
        z = scale * (x[f"{whose}_hidden"] @ x[f"{whose}_head"].T + x[f"{whose}_bias"])
        return z if cap is None else cap * torch.tanh(z / cap)

    value = loss_oracle.uld(logits("student"), logits("teacher"), T)
    return value.detach(), list(torch.autograd.grad(value, students(x)))


def students(x: dict[str, Tensor]) -> list[Tensor]:
    return [x["student_hidden"], x["student_head"], x["student_bias"]]


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("V", "Vt"), [(13, 9), (9, 13), (11, 11)])
def test_value_and_gradients_equal_the_oracle(V: int, Vt: int, temperature: float, rows: int) -> None:
    x = problem(V=V, Vt=Vt)
    value = flat_linear_uld(**x, temperature=temperature, rows=rows)
    expected, gradients = oracle(x, temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for got, wanted in zip(torch.autograd.grad(value, students(x)), gradients, strict=True):
        assert error(got, wanted) < 1e-12


def test_bias_scale_and_softcap_stand_where_the_models_have_them() -> None:
    x = problem()
    shape = {"logit_scale": 0.6, "softcap": 4.0, "teacher_logit_scale": 0.6, "teacher_softcap": 4.0}
    value = flat_linear_uld(**x, temperature=2.0, **shape)
    expected, gradients = oracle(x, 2.0, 0.6, 4.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for got, wanted in zip(torch.autograd.grad(value, students(x)), gradients, strict=True):
        assert error(got, wanted) < 1e-12


def test_three_tokens_by_hand() -> None:
    """(0.7, 0.2, 0.1) in any order against (0.6, 0.4): 0.1 + 0.2 + 0.1, and two equal vocabularies are never needed."""
    student, teacher = torch.tensor([[0.1, 0.7, 0.2]]).log(), torch.tensor([[0.6, 0.4]]).log()
    assert logits_uld(student, teacher).item() == pytest.approx(0.4, rel=1e-6)
    assert logits_uld(teacher, student).item() == pytest.approx(0.4, rel=1e-6)
    certain = torch.tensor([[500.0, 0.0, 0.0]])
    assert logits_uld(certain, torch.zeros(1, 1000)).item() == pytest.approx(2 - 2 / 1000, rel=1e-5)


def test_from_logits_it_is_the_same_and_finite_differences_agree() -> None:
    x = problem()
    student = (x["student_hidden"] @ x["student_head"].T + x["student_bias"]).detach().requires_grad_()
    teacher = (x["teacher_hidden"] @ x["teacher_head"].T + x["teacher_bias"]).detach()
    value = logits_uld(student, teacher, temperature=2.0, rows=4)
    assert value.item() == pytest.approx(flat_linear_uld(**x, temperature=2.0).item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: logits_uld(z, teacher, temperature=2.0), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_like_its_teacher_in_any_order_of_tokens_costs_nothing(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 40, generator=torch.Generator().manual_seed(0)) * 4).to(dtype).requires_grad_()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    value = logits_uld(logits, logits.detach()[:, order], temperature=2.0)
    assert value.item() < 1e-6
    assert torch.autograd.grad(value, logits)[0].abs().max() == 0


def test_tokens_that_a_model_excludes_are_like_tokens_that_it_lacks() -> None:
    student, teacher = torch.randn(3, 8).double().requires_grad_(), torch.randn(3, 5).double()
    value = logits_uld(student, teacher)
    masked = torch.cat([student.detach(), torch.full((3, 4), -torch.inf)], 1).requires_grad_()
    excluded = logits_uld(masked, torch.cat([teacher, torch.full((3, 9), -torch.inf)], 1))
    assert excluded.item() == pytest.approx(value.item(), rel=1e-12)
    found = torch.autograd.grad(excluded, masked)[0]
    assert torch.allclose(found[:, :8], torch.autograd.grad(value, student)[0], rtol=1e-12)
    assert found[:, 8:].abs().max() == 0


def test_pieces_add_up_to_the_batch() -> None:
    x = problem()
    whole = flat_linear_uld(**x, temperature=2.0)
    parts = (slice(0, 1), slice(1, 6), slice(6, 6))
    pieces = sum(
        flat_linear_uld(**{n: t[p] if n.endswith("hidden") else t for n, t in x.items()}, temperature=2.0)
        for p in parts
    )
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-12)
    expected = torch.autograd.grad(whole, students(x))
    assert all(error(g, e) < 1e-12 for g, e in zip(torch.autograd.grad(pieces, students(x)), expected, strict=True))


def test_no_positions_give_zero_and_zero_gradients() -> None:
    x = problem(M=0)
    value = flat_linear_uld(**x)
    assert value.item() == 0
    assert [g.abs().sum().item() for g in torch.autograd.grad(value, students(x))] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_only_where_it_enters_and_leaves(dtype: torch.dtype) -> None:
    x = problem(dtype, V=60, Vt=80, M=32)
    value = flat_linear_uld(**x, temperature=2.0)
    expected, gradients = oracle(x, 2.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for got, wanted in zip(torch.autograd.grad(value, students(x)), gradients, strict=True):
        assert got.dtype == dtype
        assert error(got, wanted) < 5e-3


def test_under_autocast_operands_are_rounded_and_softmaxes_are_not() -> None:
    x = problem(torch.float32, V=60, Vt=80, M=32)
    with torch.autocast("cpu", torch.bfloat16):
        value = flat_linear_uld(**x, temperature=2.0)
    products = ("student_hidden", "student_head")  # the teacher is in the dtype that it was given
    rounded = {n: t.detach().bfloat16().float() if n in products else t for n, t in x.items()}
    rounded = {n: t.detach().requires_grad_(n.startswith("student")) for n, t in rounded.items()}
    expected, gradients = oracle(rounded, 2.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for got, wanted in zip(torch.autograd.grad(value, students(x)), gradients, strict=True):
        assert got.dtype == torch.float32
        assert error(got, wanted) < 1e-5


def test_nothing_as_wide_as_the_vocabulary_is_kept_for_backward() -> None:
    x = problem(torch.bfloat16, V=60, M=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        flat_linear_uld(**x, rows=8)
        x["student_head"].requires_grad_(False)
        flat_linear_uld(**x, rows=8)
    assert [tuple(t.shape) for t in kept] == [(50, 5), (60, 5), (60,), (50, 5), (60,)]


def test_the_teacher_gets_no_gradient_and_evaluation_no_graph() -> None:
    x = problem()
    for name in ("teacher_hidden", "teacher_head", "teacher_bias"):
        x[name].requires_grad_()
    flat_linear_uld(**x).backward()
    assert all(x[name].grad is None for name in x if name.startswith("teacher"))
    with torch.no_grad():
        assert not flat_linear_uld(**x).requires_grad


def test_what_does_not_agree_is_refused_in_one_sentence() -> None:
    x = problem()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"teacher_hidden": x["teacher_hidden"][:2]}, r"teacher.hidden \(2, \d+\) must be .* student.hidden \(6, 5\)"),
        ({"student_head": x["student_head"][:, :2]}, r"student.hidden \(6, 5\) and student.weight \(13, 2\)"),
        ({"teacher_bias": x["teacher_bias"][:2]}, r"teacher.bias \(2,\) must have one element for each of 9 columns"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be a positive number"),
        ({"student_head": x["student_head"].float()}, "cast one, or use autocast"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            flat_linear_uld(**{**x, **change})
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"teacher \(3, 3\) must be .* student \(2, 3\)"):
        logits_uld(torch.zeros(2, 3), torch.zeros(3, 3))


def test_a_small_gradient_survives_float16() -> None:
    """p (g - sum p g) / T of an unlikely token is below all that float16 knows."""
    x = torch.tensor([[2e-1, -3e-9, 4e-10]])
    assert x.half()[0, 1] == 0
    rounded, factor = in_range_of(torch.float16, x)
    assert rounded.dtype == torch.float16
    torch.testing.assert_close(restored(rounded.float(), factor), x, rtol=2e-2, atol=0)
    nothing, factor = in_range_of(torch.float16, torch.zeros(1, 3))
    assert restored(nothing.float(), factor).tolist() == [[0.0, 0.0, 0.0]]
    plain, factor = in_range_of(torch.bfloat16, x)
    assert factor is None
    assert restored(plain, factor) is plain


def test_a_teacher_in_float32_is_not_rounded_under_autocast() -> None:
    """Nor one in bfloat16 beside float16, in which it would overflow."""
    torch.manual_seed(0)
    hidden, head = torch.randn(8, 16), torch.randn(30, 16)
    told = {"teacher_hidden": torch.randn(8, 12), "teacher_head": torch.randn(30, 12)}
    labels = torch.zeros(8, dtype=torch.int64)

    def value(**teacher: torch.Tensor) -> float:
        return flat_linear_kd(hidden.bfloat16().float(), head.bfloat16().float(), labels, **teacher)[
            1
        ].divergence_sum.item()

    exact = value(**told)
    with torch.autocast("cpu", torch.bfloat16):
        assert value(**told) == exact
    assert value(**{name: x.bfloat16().float() for name, x in told.items()}) != exact
    big = {"teacher_hidden": told["teacher_hidden"] * 1e5, "teacher_head": told["teacher_head"] * 1e-5}
    with torch.autocast("cpu", torch.float16):
        assert value(**{name: x.bfloat16() for name, x in big.items()}) < 1e3
