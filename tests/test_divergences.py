"""The divergences' rows against the oracle: gradients, limits, bounds, what T^2 does, and the edges of their inputs."""

import math

import loss_oracle
import pytest
import torch
from loss_oracle import DIVERGENCES, SMOOTH
from torch import Tensor

from forge.losses.checks import check_formula
from forge.losses.kd_arguments import Formula
from forge.losses.kd_settings import EQUAL, TAIL_FLOOR, Settings, teacher_share
from forge.losses.linear_kd_plain import divergence_rows, sparse_rows

MISSING_MASS = ["tail", "renormalise", "zero"]


def logits(N: int = 6, V: int = 11, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(N, V, generator=g, dtype=torch.float64) * spread for _ in range(2))  # type: ignore[return-value]


def settings(name: str, parameter: float = 0.0, temperature: float = 1.0) -> Settings:
    return Settings(1.0, temperature, name, teacher_share(name, parameter, parameter))


def oracle(name: str, parameter: float, temperature: float, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """D of each row and its gradient by autograd."""
    student = student.double().clone().requires_grad_()
    value = torch.stack(
        [loss_oracle.divergence(name, s, t, temperature, parameter) for s, t in zip(student, teacher, strict=True)]
    )
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_values_and_gradients_are_those_of_the_formula(name: str, parameter: float, temperature: float) -> None:
    student, teacher = logits()
    value, gradient = divergence_rows(student, teacher, settings(name, parameter, temperature))
    expected, expected_gradient = oracle(name, parameter, temperature, student, teacher)
    assert torch.allclose(value, expected, rtol=1e-10)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("name", "parameter"), SMOOTH)
def test_gradients_are_those_of_finite_differences(name: str, parameter: float) -> None:
    student, teacher = logits(N=2, V=5)

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            value, gradient = divergence_rows(x, teacher, settings(name, parameter, 2.0))
            ctx.save_for_backward(gradient)
            return value

        @staticmethod
        def backward(ctx, d_value):  # type: ignore[no-untyped-def]
            return ctx.saved_tensors[0] * d_value[:, None]

    assert torch.autograd.gradcheck(Rows.apply, student.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_a_student_like_its_teacher_has_neither_divergence_nor_gradient(
    name: str, parameter: float, dtype: torch.dtype
) -> None:
    student = logits(spread=8.0)[0].to(dtype)
    value, gradient = divergence_rows(student, student.clone(), settings(name, parameter, 2.0))
    assert value.abs().max() < 4 * torch.finfo(dtype).eps
    assert gradient.abs().max() < torch.finfo(dtype).eps


def test_the_direction_is_seen_in_one_example() -> None:
    """Teacher (1/2, 1/2), student (3/4, 1/4), each divergence by hand."""
    student, teacher = torch.tensor([[0.75, 0.25]]).double().log(), torch.zeros(1, 2).double()
    by_hand = {
        ("forward_kl", 0.0): 0.5 * torch.tensor(0.5 / 0.75).log() + 0.5 * torch.tensor(0.5 / 0.25).log(),
        ("reverse_kl", 0.0): 0.75 * torch.tensor(0.75 / 0.5).log() + 0.25 * torch.tensor(0.25 / 0.5).log(),
        # The mixtures hold a fifth of the teacher in skew_kl, and four fifths of it in skew_reverse_kl.
        ("skew_kl", 0.2): 0.5 * torch.tensor(0.5 / 0.7).log() + 0.5 * torch.tensor(0.5 / 0.3).log(),
        ("skew_reverse_kl", 0.2): 0.75 * torch.tensor(0.75 / 0.55).log() + 0.25 * torch.tensor(0.25 / 0.45).log(),
        ("tvd", 0.0): torch.tensor(0.25),
    }
    for (name, parameter), expected in by_hand.items():
        value, _ = divergence_rows(student, teacher, settings(name, parameter))
        assert value.item() == pytest.approx(expected.item(), rel=1e-6), name


@pytest.mark.parametrize(("skewed", "plain"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_without_skew_it_is_the_plain_divergence(skewed: str, plain: str) -> None:
    student, teacher = logits()
    value, gradient = divergence_rows(student, teacher, settings(skewed, 0.0, 2.0))
    expected, expected_gradient = divergence_rows(student, teacher, settings(plain, 0.0, 2.0))
    assert torch.allclose(value, expected, rtol=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    near, _ = divergence_rows(student, teacher, settings(skewed, 1e-7, 2.0))
    assert torch.allclose(near, expected, rtol=1e-3)
    assert not torch.equal(near, expected)


@pytest.mark.parametrize(("beta", "end"), [(1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")])
def test_jsd_over_its_smaller_share_tends_to_forward_and_reverse_kl(beta: float, end: str) -> None:
    student, teacher = logits()
    value, gradient = divergence_rows(student, teacher, settings("jsd", beta))
    expected, expected_gradient = divergence_rows(student, teacher, settings(end))
    assert torch.allclose(value / 1e-7, expected, rtol=1e-4)
    assert torch.allclose(gradient / 1e-7, expected_gradient, rtol=1e-3, atol=1e-5)


def test_the_bounded_ones_stay_bounded_where_the_models_exclude_each_other() -> None:
    """One token each, and not the same one: what bounds are stated in docs/losses.md are reached."""
    student, teacher = torch.tensor([[200.0, -200.0]]).double(), torch.tensor([[-200.0, 200.0]]).double()
    log = torch.tensor([0.3, 0.7, 0.2]).double().log()
    bounds = {
        ("jsd", 0.3): -0.3 * log[0] - 0.7 * log[1],
        ("skew_kl", 0.2): -log[2],
        ("skew_reverse_kl", 0.2): -log[2],
        ("tvd", 0.0): torch.tensor(1.0),
        ("forward_kl", 0.0): torch.tensor(400.0),
        ("reverse_kl", 0.0): torch.tensor(400.0),
    }
    for (name, parameter), expected in bounds.items():
        value, gradient = divergence_rows(student, teacher, settings(name, parameter))
        assert value.item() == pytest.approx(expected.item(), rel=1e-6), name
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_a_token_that_both_models_exclude_counts_for_nothing(name: str, parameter: float) -> None:
    student, teacher = logits()
    expected = divergence_rows(student, teacher, settings(name, parameter, 2.0))
    excluded = torch.full((6, 2), -torch.inf, dtype=torch.float64)
    student, teacher = torch.cat([student, excluded], 1), torch.cat([teacher, excluded], 1)
    value, gradient = divergence_rows(student, teacher, settings(name, parameter, 2.0))
    assert torch.allclose(value, expected[0], rtol=1e-12)
    assert torch.allclose(gradient[:, :11], expected[1], rtol=1e-12, atol=1e-15)
    assert gradient[:, 11:].abs().max() == 0


@pytest.mark.parametrize(
    ("name", "parameter", "excluded_by"),
    [*[(*d, "teacher") for d in DIVERGENCES if d[0] != "reverse_kl"], *[(*d, "student") for d in DIVERGENCES[1:]]],
)
def test_a_token_that_one_model_excludes_gives_the_formulas_finite_value(
    name: str, parameter: float, excluded_by: str
) -> None:
    """Infinite are only forward KL where the student, and reverse KL where the teacher, says never."""
    student, teacher = logits()
    (student if excluded_by == "student" else teacher)[:, 4] = -torch.inf
    value, gradient = divergence_rows(student, teacher, settings(name, parameter, 2.0))
    expected, expected_gradient = oracle(name, parameter, 2.0, student, teacher)
    assert value.isfinite().all()
    assert torch.allclose(value, expected, rtol=1e-10)
    keep = torch.arange(11) != 4 if excluded_by == "student" else torch.ones(11, dtype=torch.bool)
    assert torch.allclose(gradient[:, keep], expected_gradient[:, keep], rtol=1e-9, atol=1e-14)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameter", "factor"),
    [
        ("forward_kl", 0.0, 1.0),
        ("reverse_kl", 0.0, 1.0),
        ("jsd", 0.3, 0.3 * 0.7),
        ("skew_kl", 0.2, 0.8**2),
        ("skew_reverse_kl", 0.15, 0.85**2),
    ],
)
def test_t_squared_keeps_the_gradient_as_t_grows(name: str, parameter: float, factor: float) -> None:
    """The gradient of T^2 D tends to f (d - mean d) / V with d = z_s - z_t: Hinton et al. 2015, section 2.1."""
    student, teacher = logits(spread=1.0)
    d = student - teacher
    limit = factor * (d - d.mean(-1, keepdim=True)) / 11
    misses = []
    for T in (100.0, 1000.0):
        _, gradient = divergence_rows(student, teacher, settings(name, parameter, T))
        misses.append(((T * T * gradient - limit).norm() / limit.norm()).item())
    assert misses[0] < 0.05
    assert misses[1] < misses[0] / 8  # of order 1 / T


def test_total_variation_is_of_first_order_and_grows_with_t_under_t_squared() -> None:
    """Near equality it is an absolute value and not a square: T D would keep its size, and T^2 D doubles with T."""
    student, teacher = logits(spread=1.0)
    sizes = [T * T * divergence_rows(student, teacher, settings("tvd", 0.0, T))[1].norm().item() for T in (500.0, 1e3)]
    assert sizes[1] / sizes[0] == pytest.approx(2.0, rel=0.05)


def test_total_variation_takes_no_sign_from_rounding() -> None:
    """Probabilities within EQUAL of each other, as two products in float32 give them, pull nowhere; beyond, fully."""
    student, teacher = torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    for step, expected in ((0.3 * EQUAL, 0.0), (3 * EQUAL, 0.25)):
        student[0, 0] = step
        value, gradient = divergence_rows(student, teacher, settings("tvd"))
        assert value.item() == pytest.approx(step / 4, rel=1e-3)
        assert gradient[0, 0].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("missing_mass", MISSING_MASS)
def test_a_top_k_teacher_is_its_formula(missing_mass: str) -> None:
    student, teacher = logits()
    log_q, indices = (teacher / 2.0).log_softmax(-1).topk(4)
    log_q[2, 3] = -torch.inf
    value, gradient = sparse_rows(student, log_q, indices, Settings(1.0, 2.0, missing_mass=missing_mass))
    student.requires_grad_()
    rows = zip(student, log_q, indices, strict=True)
    expected = torch.stack([loss_oracle.sparse_kl(s, q, i, 2.0, missing_mass) for s, q, i in rows])
    assert torch.allclose(value, expected, rtol=1e-10)
    assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("missing_mass", MISSING_MASS)
def test_a_row_without_any_entry_says_nothing(missing_mass: str) -> None:
    student, teacher = logits()
    log_q, indices = (teacher / 2.0).log_softmax(-1).topk(4)
    log_q[2] = -torch.inf
    value, gradient = sparse_rows(student, log_q, indices, Settings(1.0, 2.0, missing_mass=missing_mass))
    assert (value[2].item(), gradient[2].abs().max().item()) == (0.0, 0.0)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (value != 0).sum() == 5


def test_the_tail_of_a_student_that_is_certain_of_the_top_k_is_not_below_the_floor() -> None:
    """1 - p is 0 in floating point: its logarithm would be infinite, and the gradient too."""
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    log_q, indices = torch.tensor([[0.5]], dtype=torch.float64).log(), torch.tensor([[0]])
    value, gradient = sparse_rows(student, log_q, indices, Settings(1.0, 1.0, missing_mass="tail"))
    assert value.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / TAIL_FLOOR))
    assert gradient.isfinite().all()


def test_the_tail_never_says_more_than_all_of_the_teacher_and_tends_to_it() -> None:
    """Merging the other tokens into one event can only lose divergence."""
    student, teacher = logits(V=40, spread=1.0)  # every token above the floor of the tail
    full, _ = divergence_rows(student, teacher, settings("forward_kl"))
    last = torch.zeros(6)
    for k in (1, 5, 20, 39, 40):
        log_q, indices = teacher.log_softmax(-1).topk(k)
        value, _ = sparse_rows(student, log_q, indices, Settings(1.0, 1.0, missing_mass="tail"))
        assert (value >= last - 1e-9).all()
        assert (value <= full + 1e-9).all()
        last = value
    assert torch.allclose(last, full)


@pytest.mark.parametrize("parameter", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl", "jsd"])
def test_a_share_outside_its_range_is_refused(name: str, parameter: float) -> None:
    with pytest.raises(ValueError, match=f"of {name} must be in .*, got {parameter}"):
        check_formula(Formula(divergence=name, beta=parameter, skew=parameter))
