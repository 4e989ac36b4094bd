"""The distillation loss against a float64 oracle built from hidden states, on the plain path."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from forge.losses import linear_kd as module
from forge.losses.kd_settings import Chunks, plan_chunks, row_pitch
from forge.losses.linear_kd import linear_kd
from forge.losses.logits_kd import logits_kd

IGNORE = -100
DIVERGENCES = [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.3), ("skew_kl", 0.2)]


def problem(
    N: int = 12, V: int = 37, Vt: int | None = None, Hs: int = 8, Ht: int = 16, seed: int = 0, ignored: int = 4
) -> dict[str, Tensor]:
    """Hidden states, heads and labels in float64; every ignored-th position counts for nothing."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N,), generator=g)
    if ignored:
        labels[::ignored] = IGNORE

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "student_hidden": normal(N, Hs),
        "student_head": normal(V, Hs) * (2 / Hs**0.5),
        "labels": labels,
        "teacher_hidden": normal(N, Ht),
        "teacher_head": normal(Vt or V, Ht) * (3 / Ht**0.5),
    }


def cast(tensors: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors in dtype; those that a student trains ask for a gradient."""
    out = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in tensors.items()}
    for name, x in out.items():
        if name.startswith("student"):
            x.requires_grad_()
    return out


def oracle(
    tensors: dict[str, Tensor],
    alpha: float,
    temperature: float,
    divergence: str = "forward_kl",
    mix: float = 0.0,
    scale: float = 1.0,
    cap: float | None = None,
    normalizer: float | None = None,
) -> tuple[float, float, float, dict[str, Tensor]]:
    """Loss, CE sum, D sum and gradients, from full float64 logits and autograd."""
    x = {name: t.detach().cpu() for name, t in tensors.items()}
    x = cast(x, torch.float64)
    counted = x["labels"] != IGNORE

    def logits(whose: str) -> Tensor:
        z = x[f"{whose}_hidden"] @ x[f"{whose}_head"].T + x.get(f"{whose}_bias", torch.zeros((), dtype=torch.float64))
        return z * scale if cap is None else cap * torch.tanh(z * scale / cap)

    student = logits("student")
    ce = functional.cross_entropy(student, x["labels"], ignore_index=IGNORE, reduction="sum")
    kl = torch.zeros((), dtype=torch.float64)
    if alpha > 0:
        shared = min(x["student_head"].shape[0], x["teacher_head"].shape[0])
        p = (student[counted, :shared] / temperature).softmax(-1)
        q = (logits("teacher").detach()[counted, :shared] / temperature).softmax(-1)
        m = mix * q + (1 - mix) * p
        if divergence == "forward_kl":
            kl = kl_between(q, p)
        elif divergence == "reverse_kl":
            kl = kl_between(p, q)
        elif divergence == "skew_kl":
            kl = kl_between(q, m)
        else:
            kl = mix * kl_between(q, m) + (1 - mix) * kl_between(p, m)
    loss = ((1 - alpha) * ce + alpha * temperature**2 * kl) / (normalizer or counted.sum().clamp(min=1))
    loss.backward()
    gradients = {name: t.grad for name, t in x.items() if t.grad is not None}
    return loss.item(), ce.item(), kl.item(), gradients


def kl_between(a: Tensor, b: Tensor) -> Tensor:
    """sum a log(a / b), an event that a does not know counting for nothing."""
    return torch.where(a > 0, a * (a.clamp(min=1e-300) / b.clamp(min=1e-300)).log(), 0.0).sum()


def error(got: Tensor, expected: Tensor) -> float:
    """The relative error of a whole tensor, in the Frobenius norm."""
    expected = expected.detach().double().cpu()
    return ((got.detach().double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def gradients(loss: Tensor, tensors: dict[str, Tensor], retain: bool = True) -> dict[str, Tensor]:
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), retain_graph=retain), strict=True))


def top_k(tensors: dict[str, Tensor], k: int, temperature: float) -> tuple[Tensor, Tensor]:
    teacher = tensors["teacher_hidden"].double() @ tensors["teacher_head"].double().T
    return (teacher / temperature).log_softmax(-1).topk(k)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_loss_and_gradients_equal_float64(divergence: str, mix: float, temperature: float) -> None:
    x = cast(problem(), torch.float32)
    loss, parts = linear_kd(**x, alpha=0.3, temperature=temperature, divergence=divergence, beta=mix, skew=mix)
    expected, ce, kl, expected_gradients = oracle(x, 0.3, temperature, divergence, mix)

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert parts.ce_sum.item() == pytest.approx(ce, rel=1e-5)
    assert parts.kl_sum.item() == pytest.approx(kl, rel=1e-5)
    assert parts.count.item() == 9
    assert not parts.ce_sum.requires_grad
    for name, gradient in gradients(loss, x).items():
        assert gradient.dtype == torch.float32
        assert error(gradient, expected_gradients[name]) < 1e-5, name


def test_the_oracle_itself_has_the_size_that_hinton_says() -> None:
    """T^2 D with equal logits times c has nearly the gradient at T = 1 for large T: neither T^4 nor none."""
    x = cast(problem(), torch.float64)
    size = {}
    for temperature in (50.0, 100.0):
        loss, parts = linear_kd(**x, alpha=1.0, temperature=temperature)
        size[temperature] = gradients(loss, x)["student_hidden"].norm().item()
        assert loss.item() == pytest.approx(temperature**2 * parts.kl_sum.item() / 9)
    assert size[100.0] == pytest.approx(size[50.0], rel=0.05)


def test_temperature_does_not_touch_cross_entropy() -> None:
    x = cast(problem(), torch.float64)
    sums = [linear_kd(**x, alpha=0.5, temperature=t)[1].ce_sum.item() for t in (1.0, 4.0)]
    assert sums[0] == sums[1] == pytest.approx(oracle(x, 0.0, 1.0)[1])


@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_a_student_like_its_teacher_has_no_divergence_and_no_gradient(divergence: str, mix: float) -> None:
    x = problem(Hs=16)
    x["teacher_hidden"], x["teacher_head"] = x["student_hidden"].clone(), x["student_head"].clone()
    x = cast(x, torch.float32)
    loss, parts = linear_kd(**x, alpha=1.0, temperature=2.0, divergence=divergence, beta=mix, skew=mix)

    assert abs(parts.kl_sum.item()) < 1e-5
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(loss, x).values())


def test_forward_and_reverse_are_not_the_same_and_skew_of_nothing_is_forward() -> None:
    x = cast(problem(), torch.float64)
    forward = linear_kd(**x, alpha=1.0)[0].item()
    assert abs(linear_kd(**x, alpha=1.0, divergence="reverse_kl")[0].item() - forward) > 0.1
    assert linear_kd(**x, alpha=1.0, divergence="skew_kl", skew=0.0)[0].item() == pytest.approx(forward, rel=1e-12)


def test_jsd_tends_to_the_two_directions_at_its_ends() -> None:
    """beta KL(q || m) is all of it that is of first order at beta = 0, and likewise at 1."""
    x = cast(problem(), torch.float64)
    for beta, end in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        near = linear_kd(**x, alpha=1.0, divergence="jsd", beta=beta)[0].item() / min(beta, 1 - beta)
        assert near == pytest.approx(linear_kd(**x, alpha=1.0, divergence=end)[0].item(), rel=1e-3)


def test_ignored_positions_count_in_neither_part_nor_in_any_gradient() -> None:
    x = problem()
    wild = {**x, "student_hidden": x["student_hidden"].clone()}
    wild["student_hidden"][x["labels"] == IGNORE] *= 50
    for tensors in (x, wild):
        tensors = cast(tensors, torch.float64)
        loss, parts = linear_kd(**tensors, alpha=0.5, temperature=2.0)
        _, _, kl, expected_gradients = oracle(tensors, 0.5, 2.0)
        assert parts.kl_sum.item() == pytest.approx(kl)
        found = gradients(loss, tensors)
        assert error(found["student_head"], expected_gradients["student_head"]) < 1e-9
        assert found["student_hidden"][tensors["labels"] == IGNORE].abs().max() == 0


@pytest.mark.parametrize("compact", [False, True])
def test_no_counted_position_gives_zero_and_zero_gradients(compact: bool) -> None:
    x = cast(problem(), torch.float32)
    x["labels"] = torch.full_like(x["labels"], IGNORE)
    loss, parts = linear_kd(**x, alpha=0.5, temperature=2.0, compact=compact)
    loss.backward()

    assert (loss.item(), parts.count.item()) == (0.0, 0)
    for name in ("student_hidden", "student_head"):
        assert x[name].grad is not None
        assert x[name].grad.abs().max() == 0


def test_labels_are_taken_as_they_stand_and_not_shifted() -> None:
    x = cast(problem(N=2, ignored=0), torch.float64)
    log_p = (x["student_hidden"] @ x["student_head"].T).log_softmax(-1)
    expected = -log_p[0, x["labels"][0]] - log_p[1, x["labels"][1]]
    assert linear_kd(**x, alpha=0.0)[1].ce_sum.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("N", [1, 12])
@pytest.mark.parametrize("rows", [1, 5, 12, 100])
def test_the_size_of_the_chunks_changes_nothing(N: int, rows: int) -> None:
    x = cast(problem(N=N, ignored=0), torch.float64)
    loss, _ = linear_kd(**x, alpha=0.5, temperature=2.0, chunks=Chunks(rows, rows))
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0)

    assert loss.item() == pytest.approx(expected)
    assert all(error(g, expected_gradients[name]) < 1e-12 for name, g in gradients(loss, x).items())


@pytest.mark.parametrize("Vt", [30, 50])
@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_padding_of_the_wider_head_is_left_out_of_the_divergence(Vt: int, divergence: str, mix: float) -> None:
    x = cast(problem(Vt=Vt), torch.float64)  # V is 37
    loss, parts = linear_kd(**x, alpha=0.5, temperature=2.0, divergence=divergence, beta=mix, skew=mix)
    expected, ce, kl, expected_gradients = oracle(x, 0.5, 2.0, divergence, mix)

    assert (loss.item(), parts.kl_sum.item()) == (pytest.approx(expected), pytest.approx(kl))
    assert parts.ce_sum.item() == pytest.approx(ce)  # over all 37
    assert all(error(g, expected_gradients[name]) < 1e-9 for name, g in gradients(loss, x).items())


def test_bias_scale_and_softcap_stand_where_the_models_have_them() -> None:
    x = problem()
    x["student_bias"], x["teacher_bias"] = torch.linspace(-1, 1, 37).double(), torch.linspace(2, -1, 37).double()
    x = cast(x, torch.float64)
    shape = {"logit_scale": 0.6, "softcap": 4.0, "teacher_logit_scale": 0.6, "teacher_softcap": 4.0}
    loss, _ = linear_kd(**x, alpha=0.5, temperature=2.0, **shape)
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0, scale=0.6, cap=4.0)

    assert loss.item() == pytest.approx(expected)
    found = gradients(loss, x)
    assert set(found) == {"student_hidden", "student_head", "student_bias"}
    assert all(error(g, expected_gradients[name]) < 1e-9 for name, g in found.items())


@pytest.mark.parametrize(("divergence", "mix"), [d for d in DIVERGENCES if d[0] != "reverse_kl"])
def test_a_token_that_both_models_exclude_makes_no_nan(divergence: str, mix: float) -> None:
    x = problem()
    x["labels"][x["labels"] == 3] = 4
    x["student_bias"] = torch.zeros(37, dtype=torch.float64)
    x["student_bias"][3] = -torch.inf
    x["teacher_bias"] = x["student_bias"].clone()
    x = cast(x, torch.float64)
    loss, _ = linear_kd(**x, alpha=0.5, temperature=2.0, divergence=divergence, beta=mix, skew=mix)
    keep = torch.arange(37) != 3
    fewer = {name: t.detach()[keep] if t.shape[0] == 37 else t.detach() for name, t in x.items()}
    fewer["labels"] = torch.where(x["labels"] > 3, x["labels"] - 1, x["labels"])

    assert loss.item() == pytest.approx(oracle(fewer, 0.5, 2.0, divergence, mix)[0])
    assert all(g.isfinite().all() for g in gradients(loss, x).values())


def test_the_incoming_gradient_is_not_rounded_to_the_weights_dtype() -> None:
    x = cast(problem(), torch.bfloat16)
    factor = 1.006  # in bfloat16 1.0078125
    loss, _ = linear_kd(**x, alpha=0.5, temperature=2.0, normalizer=torch.tensor(1.0))
    plain = gradients(loss, x)["student_head"].float()
    scaled = gradients(loss * factor, x)["student_head"].float()
    assert torch.equal(scaled, (plain * factor).bfloat16().float())
    assert not torch.equal(scaled, (plain * 1.0078125).bfloat16().float())


def test_backward_can_run_twice_and_through_a_sum() -> None:
    x = cast(problem(), torch.float64)
    loss, _ = linear_kd(**x, alpha=0.5, temperature=2.0)
    first, second = gradients(loss, x), gradients(loss, x)
    other, _ = linear_kd(**x, alpha=0.0)
    both = gradients(3 * loss + other, x)
    for name in first:
        assert torch.equal(first[name], second[name])
        assert torch.allclose(both[name], 3 * first[name] + gradients(other, x)[name], rtol=1e-12)


def test_the_heads_gradient_is_summed_in_float32() -> None:
    """In bfloat16 a sum of 512 chunks would stop growing at 256 times its step."""
    N = 512
    hidden = torch.ones(N, 8, dtype=torch.bfloat16)
    head = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(N, dtype=torch.int64)
    loss, _ = linear_kd(hidden, head, labels, alpha=0.0, normalizer=torch.tensor(1.0), chunks=Chunks(1, 1))
    loss.backward()
    assert head.grad is not None
    assert head.grad[1, 0].item() == 128.0
    assert head.grad[0, 0].item() == -384.0


def test_unequal_micro_batches_add_up_to_the_whole_batch() -> None:
    whole = cast(problem(N=12), torch.float64)
    count = (whole["labels"] != IGNORE).sum()
    loss, _ = linear_kd(**whole, alpha=0.5, temperature=2.0)
    total = 0.0
    for part in (slice(0, 3), slice(3, 12)):
        rows = {name: t[part] if t.shape[0] == 12 else t for name, t in whole.items()}
        total = total + linear_kd(**rows, alpha=0.5, temperature=2.0, normalizer=count)[0]
    assert total.item() == pytest.approx(loss.item())
    expected = gradients(loss, whole)
    assert all(error(g, expected[name]) < 1e-12 for name, g in gradients(total, whole).items())


def test_a_tied_head_gets_both_of_its_gradients() -> None:
    x = problem(Hs=8)
    head = x["student_head"].clone().requires_grad_()
    tokens = torch.arange(12)
    loss, _ = linear_kd(head[tokens], head, x["labels"], alpha=0.0)
    loss.backward()
    again = x["student_head"].clone().requires_grad_()
    functional.cross_entropy(again[tokens] @ again.T, x["labels"], ignore_index=IGNORE).backward()
    assert error(head.grad, again.grad) < 1e-12


def test_evaluation_gives_the_same_loss_without_a_graph() -> None:
    x = cast(problem(), torch.float64)
    loss, _ = linear_kd(**x, alpha=0.5, temperature=2.0)
    with torch.no_grad():
        evaluated, _ = linear_kd(**x, alpha=0.5, temperature=2.0)
    assert evaluated.item() == loss.item()
    assert not evaluated.requires_grad


def test_the_teacher_gets_no_graph() -> None:
    x = cast(problem(), torch.float64)
    x["teacher_hidden"].requires_grad_()
    x["teacher_head"].requires_grad_()
    linear_kd(**x, alpha=0.5)[0].backward()
    assert x["teacher_hidden"].grad is None
    assert x["teacher_head"].grad is None
    frozen = {name: t.detach() if name.startswith("student") else t for name, t in x.items()}
    assert not linear_kd(**frozen, alpha=0.5)[0].requires_grad


def test_a_frozen_head_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = module.computed

    def spy(*args: Any, **settings: Any) -> Any:
        seen.append(real(*args, **settings))
        return seen[-1]

    monkeypatch.setattr(module, "computed", spy)
    x = cast(problem(), torch.float64)
    expected = oracle(x, 0.5, 2.0)[3]["student_hidden"]
    x["student_head"].requires_grad_(False)
    linear_kd(**x, alpha=0.5, temperature=2.0)[0].backward()

    assert error(x["student_hidden"].grad, expected) < 1e-12
    assert seen[0].d_head.numel() == 0
    with torch.no_grad():
        linear_kd(**x, alpha=0.5)
    assert [seen[1].d_head.numel(), seen[1].d_hidden.numel()] == [0, 0]


def test_alpha_zero_never_looks_at_a_teacher_and_alpha_one_reports_cross_entropy() -> None:
    x = cast(problem(), torch.float64)
    broken = {**x, "teacher_hidden": torch.zeros(1), "teacher_head": torch.zeros(2, 3, 4)}
    loss, parts = linear_kd(**broken, alpha=0.0)
    assert loss.item() == pytest.approx(oracle(x, 0.0, 1.0)[0])
    assert parts.kl_sum.item() == 0

    loss, parts = linear_kd(**x, alpha=1.0, temperature=2.0)
    expected, ce, kl, _ = oracle(x, 1.0, 2.0)
    assert (loss.item(), parts.ce_sum.item()) == (pytest.approx(expected), pytest.approx(ce))
    assert parts.kl_sum.item() == pytest.approx(kl)


def test_autocast_multiplies_in_bfloat16_and_keeps_master_gradients_in_float32() -> None:
    x = cast(problem(N=64, V=200), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_kd(**x, alpha=0.5, temperature=2.0)
    found = gradients(loss, x)
    rounded = {name: t.detach().bfloat16() if t.is_floating_point() else t for name, t in x.items()}
    expected, _, _, expected_gradients = oracle(rounded, 0.5, 2.0)

    assert loss.item() == pytest.approx(expected, rel=1e-5)  # sums are not rounded, only the operands
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert error(gradient, expected_gradients[name]) < 1e-5, name


def test_strided_inputs_are_read_where_they_lie() -> None:
    x = problem()
    expected = oracle(x, 0.5, 2.0)[0]
    strided = {name: torch.stack([t, t * 7], dim=1)[:, 0] for name, t in x.items()}
    for name in ("student_head", "teacher_head"):
        strided[name] = x[name].T.contiguous().T
    assert not strided["student_hidden"].is_contiguous()
    strided = cast(strided, torch.float64)
    loss, _ = linear_kd(**strided, alpha=0.5, temperature=2.0)
    assert loss.item() == pytest.approx(expected)
    assert all(g.isfinite().all() for g in gradients(loss, strided).values())


def test_two_runs_give_the_same_bits() -> None:
    x = cast(problem(N=50, V=300), torch.float32)
    runs = [gradients(linear_kd(**x, alpha=0.5, temperature=2.0, chunks=Chunks(7, 7))[0], x) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_rounded_only_where_they_enter_and_leave(dtype: torch.dtype) -> None:
    x = cast(problem(N=64, V=200), dtype)
    loss, _ = linear_kd(**x, alpha=0.5, temperature=2.0)
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(loss, x).items():
        assert gradient.dtype == dtype
        assert error(gradient, expected_gradients[name]) < 4e-3


def test_leaving_ignored_rows_out_of_the_products_changes_nothing() -> None:
    x = cast(problem(), torch.float64)
    both = [linear_kd(**x, alpha=0.5, temperature=2.0, compact=compact) for compact in (False, True)]
    assert both[0][0].item() == pytest.approx(both[1][0].item())
    found = [gradients(loss, x) for loss, _ in both]
    assert all(error(found[1][name], found[0][name]) < 1e-12 for name in found[0])


@pytest.mark.parametrize("missing_mass", ["tail", "renormalise", "zero"])
def test_a_top_k_teacher_is_what_its_definition_says(missing_mass: str) -> None:
    T = 2.0
    x = cast(problem(), torch.float64)
    log_q, indices = top_k(x, 5, T)
    student = {name: x[name] for name in ("student_hidden", "student_head", "labels")}
    loss, parts = linear_kd(
        **student, teacher_log_probs=log_q, teacher_indices=indices, missing_mass=missing_mass, alpha=0.5, temperature=T
    )
    logits = x["student_hidden"] @ x["student_head"].T
    log_p = (logits / T).log_softmax(-1)
    top = log_p.gather(1, indices)
    q = log_q.exp()
    if missing_mass == "renormalise":
        q = q / q.sum(-1, keepdim=True)
    kl = (q * (q.log() - top)).sum(-1)
    if missing_mass == "tail":
        left, student_left = 1 - q.sum(-1), 1 - top.exp().sum(-1)
        kl = kl + left * (left / student_left).log()
    counted = x["labels"] != IGNORE
    ce = functional.cross_entropy(logits, x["labels"], ignore_index=IGNORE, reduction="sum")
    expected = (0.5 * ce + 0.5 * T * T * kl[counted].sum()) / 9

    assert loss.item() == pytest.approx(expected.item())
    assert parts.kl_sum.item() == pytest.approx(kl[counted].sum().item())
    wanted = gradients(expected, {name: x[name] for name in ("student_hidden", "student_head")})
    assert all(error(g, wanted[name]) < 1e-9 for name, g in gradients(loss, student).items())


@pytest.mark.parametrize("missing_mass", ["tail", "renormalise", "zero"])
def test_all_of_a_teachers_tokens_are_the_dense_teacher(missing_mass: str) -> None:
    x = cast(problem(), torch.float64)
    log_q, indices = top_k(x, 37, 2.0)
    student = {name: x[name] for name in ("student_hidden", "student_head", "labels")}
    options = {"alpha": 1.0, "temperature": 2.0, "missing_mass": missing_mass}
    dense = linear_kd(**x, alpha=1.0, temperature=2.0)[0].item()
    sparse, _ = linear_kd(**student, teacher_log_probs=log_q, teacher_indices=indices, **options)
    assert sparse.item() == pytest.approx(dense)

    absent = torch.full_like(log_q[:, :3], -torch.inf)  # padding of a ragged cache, at any index
    log_q, indices = torch.cat([log_q[:, :9], absent], 1), torch.cat([indices[:, :9], indices[:, :3]], 1)
    padded, _ = linear_kd(**student, teacher_log_probs=log_q, teacher_indices=indices, **options)
    short, _ = linear_kd(**student, teacher_log_probs=log_q[:, :9], teacher_indices=indices[:, :9], **options)
    assert padded.item() == pytest.approx(short.item())
    assert all(
        torch.allclose(g, gradients(short, student)[name], atol=1e-12) for name, g in gradients(padded, student).items()
    )


def test_one_graph_and_no_compilation_per_length() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(hidden: Tensor, head: Tensor, labels: Tensor, teacher: Tensor, teacher_head: Tensor) -> tuple[Tensor, Any]:
        return linear_kd(hidden, head, labels, teacher_hidden=teacher, teacher_head=teacher_head, temperature=2.0)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for N in (6, 9, 13, 20):
        x = cast(problem(N=N), torch.float64)
        loss, parts = compiled(*x.values())
        expected, ce, _, expected_gradients = oracle(x, 0.5, 2.0)
        assert (loss.item(), parts.ce_sum.item()) == (pytest.approx(expected), pytest.approx(ce))
        found = gradients(loss, x, retain=False)
        assert all(error(g, expected_gradients[name]) < 1e-9 for name, g in found.items())
    assert counter.frame_count == 2  # the first length as it is, then any
    operators = [node for graph in counter.graphs for node in graph.graph.nodes if "linear_kd" in str(node.target)]
    assert len(operators) == 2


def test_the_operator_declares_what_it_does() -> None:
    x = cast(problem(N=5, V=11), torch.float64)
    names = ["student_hidden", "student_head", "labels"]
    numbers = [0.5, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    call = (*(x[n] for n in names), None, x["teacher_hidden"], x["teacher_head"], None, None, None, numbers)
    for wanted in ([True, True, False], [False, True, False], [True, False, False], [False, False, False]):
        rest = ("forward_kl", "tail", IGNORE, torch.float64, torch.float64, wanted, False, None, None, False, None)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.forge.linear_kd.default, (*call, *rest), test_utils=tests)


@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_from_the_logits_of_three_classes_it_is_the_same_loss(divergence: str, mix: float) -> None:
    x = cast(problem(V=3), torch.float64)
    settings: dict[str, Any] = {"alpha": 0.4, "temperature": 2.0, "divergence": divergence, "beta": mix, "skew": mix}
    student, teacher = (x[f"{whose}_hidden"] @ x[f"{whose}_head"].T for whose in ("student", "teacher"))
    loss, parts = logits_kd(student, teacher, x["labels"], **settings)
    expected, ce, kl, expected_gradients = oracle(x, 0.4, 2.0, divergence, mix)

    assert loss.item() == pytest.approx(expected)
    assert (parts.ce_sum.item(), parts.kl_sum.item()) == (pytest.approx(ce), pytest.approx(kl))
    assert all(error(g, expected_gradients[name]) < 1e-12 for name, g in gradients(loss, x).items())
    alone, _ = logits_kd(student, None, x["labels"], alpha=0.0)
    assert alone.item() == pytest.approx(ce / 9)
    with pytest.raises(ValueError, match="alpha > 0 needs teacher_logits"):
        logits_kd(student, None, x["labels"])


def test_what_makes_no_sense_is_refused_in_one_sentence() -> None:
    x = cast(problem(), torch.float32)
    log_q, indices = top_k(x, 4, 1.0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 0.0}, "temperature must be a positive number, and it is 0.0."),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], and it is -0.1."),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl"),
        ({"divergence": "jsd", "beta": 0.0}, "beta of jsd must lie strictly between 0 and 1"),
        ({"divergence": "jsd", "beta": 1.0}, "the limits are called forward_kl and reverse_kl"),
        ({"divergence": "skew_kl", "skew": 1.0}, r"skew of skew_kl must lie in \[0, 1\)"),
        ({"precision": "fp8"}, "precision must be one of difference, fp32, bf16"),
        ({"missing_mass": "lost"}, "missing_mass must be one of tail"),
        ({"softcap": -1.0}, "A softcap must be positive"),
        ({"labels": x["labels"][:3]}, r"labels \(3,\)"),
        ({"labels": x["labels"].float()}, "must be int64"),
        ({"student_head": x["student_head"][:, :4]}, r"student_hidden \(12, 8\) and student_head \(37, 4\)"),
        ({"student_bias": torch.zeros(3)}, r"student_bias \(3,\) must have one element for each of 37 columns"),
        ({"teacher_hidden": None}, "teacher_hidden and teacher_head must both be given"),
        ({"teacher_hidden": x["teacher_hidden"][:5]}, "teacher_hidden has 5 rows, and student_hidden has 12"),
        ({"teacher_hidden": None, "teacher_head": None}, "alpha > 0 needs one teacher"),
        ({"teacher_log_probs": log_q, "teacher_indices": indices}, "alpha > 0 needs one teacher"),
        ({"student_head": x["student_head"].bfloat16()}, "cast one, or autocast"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            linear_kd(**{"alpha": 0.5, **x, **change})
        assert str(raised.value).count("\n") == 0
    student = {name: x[name] for name in ("student_hidden", "student_head", "labels")}
    with pytest.raises(ValueError, match="A top-k teacher knows forward_kl only"):
        linear_kd(**student, teacher_log_probs=log_q, teacher_indices=indices, divergence="jsd")
    with pytest.raises(ValueError, match="with one shape"):
        linear_kd(**student, teacher_log_probs=log_q, teacher_indices=indices[:, :2])


def test_the_plain_path_says_once_why_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_warned", set())
    x = cast(problem(), torch.float32)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        for _ in range(3):
            linear_kd(**x)
    assert [record.message for record in caplog.records] == [
        "linear_kd takes the plain path: its kernels need a CUDA device, and the tensors are on cpu."
    ]


def test_the_plan_keeps_its_budget_and_does_not_grow_with_the_batch() -> None:
    V, H = 128256, 2048

    def scratch(chunks: Chunks, N: int) -> int:
        accumulator = V * H * 4 if chunks.wide < N else 0
        lent = 0 if chunks.wide < N else V * H * 2
        return max(0, chunks.rows * row_pitch(V) * 2 - lent) + chunks.wide * row_pitch(V) * 2 + accumulator

    assert plan_chunks(8192, V, H, logit_bytes=2) == Chunks(2048, 8192)
    for N in (1, 100, 1024, 8192, 30000, 200000):
        for budget in (None, 2**31, 3 * 2**29):
            chunks = plan_chunks(N, V, H, logit_bytes=2, memory_budget=budget)
            assert chunks.rows <= chunks.wide <= max(N, 1)
            assert scratch(chunks, N) <= (budget or 3 * 2**30)
    assert plan_chunks(30000, V, H, logit_bytes=2) == plan_chunks(200000, V, H, logit_bytes=2)
    assert plan_chunks(8192, V, H, logit_bytes=2, low_memory=True).wide == 2048
    assert plan_chunks(8192, V, H, logit_bytes=2, memory_budget=1) == Chunks(128, 128)  # the least there is


@pytest.mark.slow
def test_the_kernels_in_tritons_interpreter() -> None:
    """test_linear_kd_triton.py in a process of its own: triton decides at its import whether it interprets."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("test_linear_kd_triton.py runs by itself")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, so the kernels cannot even be interpreted")
    file = Path(__file__).with_name("test_linear_kd_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=file.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout.splitlines()[-1]
