"""The distillation loss against a float64 oracle built from hidden states, on the plain path."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import loss_oracle
import pytest
import torch
from kd_calls import flat_linear_kd
from loss_oracle import DIVERGENCES, IGNORE
from torch import Tensor
from torch.nn import functional

from forge.losses.kd_settings import Chunks


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
    """Loss, CE sum, D sum and gradients, from full float64 logits and autograd; mix is beta or skew."""
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
        pairs = zip(student[counted], logits("teacher").detach()[counted], strict=True)
        kl = kl + sum(loss_oracle.divergence(divergence, s, t, temperature, mix) for s, t in pairs)
    loss = ((1 - alpha) * ce + alpha * temperature**2 * kl) / (normalizer or counted.sum().clamp(min=1))
    loss.backward()
    gradients = {name: t.grad for name, t in x.items() if t.grad is not None}
    return loss.item(), ce.item(), kl.item(), gradients


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
    loss, parts = flat_linear_kd(**x, alpha=0.3, temperature=temperature, divergence=divergence, beta=mix, skew=mix)
    expected, ce, kl, expected_gradients = oracle(x, 0.3, temperature, divergence, mix)

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert parts.ce_sum.item() == pytest.approx(ce, rel=1e-5)
    assert parts.divergence_sum.item() == pytest.approx(kl, rel=1e-5)
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
        loss, parts = flat_linear_kd(**x, alpha=1.0, temperature=temperature)
        size[temperature] = gradients(loss, x)["student_hidden"].norm().item()
        assert loss.item() == pytest.approx(temperature**2 * parts.divergence_sum.item() / 9)
    assert size[100.0] == pytest.approx(size[50.0], rel=0.05)


def test_temperature_does_not_touch_cross_entropy() -> None:
    x = cast(problem(), torch.float64)
    sums = [flat_linear_kd(**x, alpha=0.5, temperature=t)[1].ce_sum.item() for t in (1.0, 4.0)]
    assert sums[0] == sums[1] == pytest.approx(oracle(x, 0.0, 1.0)[1])


@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_a_student_like_its_teacher_has_no_divergence_and_no_gradient(divergence: str, mix: float) -> None:
    x = problem(Hs=16)
    x["teacher_hidden"], x["teacher_head"] = x["student_hidden"].clone(), x["student_head"].clone()
    x = cast(x, torch.float32)
    loss, parts = flat_linear_kd(**x, alpha=1.0, temperature=2.0, divergence=divergence, beta=mix, skew=mix)

    assert abs(parts.divergence_sum.item()) < 1e-5
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(loss, x).values())


def test_forward_and_reverse_are_not_the_same_and_no_skew_is_either() -> None:
    x = cast(problem(), torch.float64)
    forward = flat_linear_kd(**x, alpha=1.0)[0].item()
    reverse = flat_linear_kd(**x, alpha=1.0, divergence="reverse_kl")[0].item()
    assert abs(reverse - forward) > 0.1
    assert flat_linear_kd(**x, alpha=1.0, divergence="skew_kl", skew=0.0)[0].item() == pytest.approx(forward, rel=1e-12)
    unskewed = flat_linear_kd(**x, alpha=1.0, divergence="skew_reverse_kl", skew=0.0)[0].item()
    assert unskewed == pytest.approx(reverse, rel=1e-12)


def test_jsd_tends_to_the_two_directions_at_its_ends() -> None:
    """beta KL(q || m) is all of it that is of first order at beta = 0, and likewise at 1."""
    x = cast(problem(), torch.float64)
    for beta, end in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        near = flat_linear_kd(**x, alpha=1.0, divergence="jsd", beta=beta)[0].item() / min(beta, 1 - beta)
        assert near == pytest.approx(flat_linear_kd(**x, alpha=1.0, divergence=end)[0].item(), rel=1e-3)


def test_ignored_positions_count_in_neither_part_nor_in_any_gradient() -> None:
    x = problem()
    wild = {**x, "student_hidden": x["student_hidden"].clone()}
    wild["student_hidden"][x["labels"] == IGNORE] *= 50
    for tensors in (x, wild):
        tensors = cast(tensors, torch.float64)
        loss, parts = flat_linear_kd(**tensors, alpha=0.5, temperature=2.0)
        _, _, kl, expected_gradients = oracle(tensors, 0.5, 2.0)
        assert parts.divergence_sum.item() == pytest.approx(kl)
        found = gradients(loss, tensors)
        assert error(found["student_head"], expected_gradients["student_head"]) < 1e-9
        assert found["student_hidden"][tensors["labels"] == IGNORE].abs().max() == 0


@pytest.mark.parametrize("compact", [False, True])
def test_no_counted_position_gives_zero_and_zero_gradients(compact: bool) -> None:
    x = cast(problem(), torch.float32)
    x["labels"] = torch.full_like(x["labels"], IGNORE)
    loss, parts = flat_linear_kd(**x, alpha=0.5, temperature=2.0, compact=compact)
    loss.backward()

    assert (loss.item(), parts.count.item()) == (0.0, 0)
    for name in ("student_hidden", "student_head"):
        assert x[name].grad is not None
        assert x[name].grad.abs().max() == 0


def test_labels_are_taken_as_they_stand_and_not_shifted() -> None:
    x = cast(problem(N=2, ignored=0), torch.float64)
    log_p = (x["student_hidden"] @ x["student_head"].T).log_softmax(-1)
    expected = -log_p[0, x["labels"][0]] - log_p[1, x["labels"][1]]
    assert flat_linear_kd(**x, alpha=0.0)[1].ce_sum.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("N", [1, 12])
@pytest.mark.parametrize("rows", [1, 5, 12, 100])
def test_the_size_of_the_chunks_changes_nothing(N: int, rows: int) -> None:
    x = cast(problem(N=N, ignored=0), torch.float64)
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0, chunks=Chunks(rows, rows))
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0)

    assert loss.item() == pytest.approx(expected)
    assert all(error(g, expected_gradients[name]) < 1e-12 for name, g in gradients(loss, x).items())


@pytest.mark.parametrize("V", [32001, 50257])
def test_the_odd_vocabularies_of_true_models(V: int) -> None:
    x = cast(problem(N=2, V=V, ignored=0), torch.float32)
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0)
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(error(g, expected_gradients[name]) < 1e-5 for name, g in gradients(loss, x).items())


@pytest.mark.parametrize("Vt", [30, 50])
@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_padding_of_the_wider_head_is_left_out_of_the_divergence(Vt: int, divergence: str, mix: float) -> None:
    x = cast(problem(Vt=Vt), torch.float64)  # V is 37
    loss, parts = flat_linear_kd(**x, alpha=0.5, temperature=2.0, divergence=divergence, beta=mix, skew=mix)
    expected, ce, kl, expected_gradients = oracle(x, 0.5, 2.0, divergence, mix)

    assert (loss.item(), parts.divergence_sum.item()) == (pytest.approx(expected), pytest.approx(kl))
    assert parts.ce_sum.item() == pytest.approx(ce)  # over all 37
    assert all(error(g, expected_gradients[name]) < 1e-9 for name, g in gradients(loss, x).items())


def test_bias_scale_and_softcap_stand_where_the_models_have_them() -> None:
    x = problem()
    x["student_bias"], x["teacher_bias"] = torch.linspace(-1, 1, 37).double(), torch.linspace(2, -1, 37).double()
    x = cast(x, torch.float64)
    shape = {"logit_scale": 0.6, "softcap": 4.0, "teacher_logit_scale": 0.6, "teacher_softcap": 4.0}
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0, **shape)
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0, scale=0.6, cap=4.0)

    assert loss.item() == pytest.approx(expected)
    found = gradients(loss, x)
    assert set(found) == {"student_hidden", "student_head", "student_bias"}
    assert all(error(g, expected_gradients[name]) < 1e-9 for name, g in found.items())


@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_a_token_that_both_models_exclude_makes_no_nan(divergence: str, mix: float) -> None:
    x = problem()
    x["labels"][x["labels"] == 3] = 4
    x["student_bias"] = torch.zeros(37, dtype=torch.float64)
    x["student_bias"][3] = -torch.inf
    x["teacher_bias"] = x["student_bias"].clone()
    x = cast(x, torch.float64)
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0, divergence=divergence, beta=mix, skew=mix)
    keep = torch.arange(37) != 3
    fewer = {name: t.detach()[keep] if t.shape[0] == 37 else t.detach() for name, t in x.items()}
    fewer["labels"] = torch.where(x["labels"] > 3, x["labels"] - 1, x["labels"])

    assert loss.item() == pytest.approx(oracle(fewer, 0.5, 2.0, divergence, mix)[0])
    assert all(g.isfinite().all() for g in gradients(loss, x).values())


def test_alpha_zero_never_looks_at_a_teacher_and_alpha_one_reports_cross_entropy() -> None:
    x = cast(problem(), torch.float64)
    broken = {**x, "teacher_hidden": torch.zeros(1), "teacher_head": torch.zeros(2, 3, 4)}
    loss, parts = flat_linear_kd(**broken, alpha=0.0)
    assert loss.item() == pytest.approx(oracle(x, 0.0, 1.0)[0])
    assert parts.divergence_sum.item() == 0

    loss, parts = flat_linear_kd(**x, alpha=1.0, temperature=2.0)
    expected, ce, kl, _ = oracle(x, 1.0, 2.0)
    assert (loss.item(), parts.ce_sum.item()) == (pytest.approx(expected), pytest.approx(ce))
    assert parts.divergence_sum.item() == pytest.approx(kl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_rounded_only_where_they_enter_and_leave(dtype: torch.dtype) -> None:
    x = cast(problem(N=64, V=200), dtype)
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0)
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(loss, x).items():
        assert gradient.dtype == dtype
        assert error(gradient, expected_gradients[name]) < 4e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_the_gradient_holds_near_convergence_where_bf16_logits_would_lose_it(temperature: float) -> None:
    """Logits of standard deviation 10 that differ by 0.1: rounded to bfloat16, the loss would hardly tell."""
    g = torch.Generator().manual_seed(0)
    N, V, H = 32, 500, 64
    hidden, teacher = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) * (10 / H**0.5)
    near = teacher.bfloat16().float() + torch.randn(V, H, generator=g) * (0.1 / H**0.5)
    x = {"student_hidden": hidden, "student_head": near, "labels": torch.arange(N)}
    x = cast({**x, "teacher_hidden": hidden, "teacher_head": teacher}, torch.bfloat16)
    loss, _ = flat_linear_kd(**x, alpha=1.0, temperature=temperature)
    expected = oracle(x, 1.0, temperature)[3]
    assert all(error(found, expected[name]) < 3e-3 for name, found in gradients(loss, x).items())

    z, y = (x[f"{whose}_hidden"].detach() @ x[f"{whose}_head"].detach().T for whose in ("student", "teacher"))
    difference = (z.float() / temperature).softmax(-1) - (y.float() / temperature).softmax(-1)
    lost = temperature / N * difference @ x["student_head"].detach().float()
    assert error(lost, expected["student_hidden"]) > 0.2


def test_leaving_ignored_rows_out_of_the_products_changes_nothing() -> None:
    x = cast(problem(), torch.float64)
    both = [flat_linear_kd(**x, alpha=0.5, temperature=2.0, compact=compact) for compact in (False, True)]
    assert both[0][0].item() == pytest.approx(both[1][0].item())
    found = [gradients(loss, x) for loss, _ in both]
    assert all(error(found[1][name], found[0][name]) < 1e-12 for name in found[0])


@pytest.mark.parametrize("missing_mass", ["tail", "renormalise", "zero"])
def test_a_top_k_teacher_is_what_its_definition_says(missing_mass: str) -> None:
    T = 2.0
    x = cast(problem(), torch.float64)
    log_q, indices = top_k(x, 5, T)
    student = {name: x[name] for name in ("student_hidden", "student_head", "labels")}
    loss, parts = flat_linear_kd(
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
    assert parts.divergence_sum.item() == pytest.approx(kl[counted].sum().item())
    wanted = gradients(expected, {name: x[name] for name in ("student_hidden", "student_head")})
    assert all(error(g, wanted[name]) < 1e-9 for name, g in gradients(loss, student).items())


@pytest.mark.parametrize("missing_mass", ["tail", "renormalise", "zero"])
def test_all_of_a_teachers_tokens_are_the_dense_teacher(missing_mass: str) -> None:
    x = cast(problem(), torch.float64)
    log_q, indices = top_k(x, 37, 2.0)
    student = {name: x[name] for name in ("student_hidden", "student_head", "labels")}
    options = {"alpha": 1.0, "temperature": 2.0, "missing_mass": missing_mass}
    dense = flat_linear_kd(**x, alpha=1.0, temperature=2.0)[0].item()
    sparse, _ = flat_linear_kd(**student, teacher_log_probs=log_q, teacher_indices=indices, **options)
    assert sparse.item() == pytest.approx(dense)

    absent = torch.full_like(log_q[:, :3], -torch.inf)  # padding of a ragged cache, at any index
    log_q, indices = torch.cat([log_q[:, :9], absent], 1), torch.cat([indices[:, :9], indices[:, :3]], 1)
    padded, _ = flat_linear_kd(**student, teacher_log_probs=log_q, teacher_indices=indices, **options)
    short, _ = flat_linear_kd(**student, teacher_log_probs=log_q[:, :9], teacher_indices=indices[:, :9], **options)
    assert padded.item() == pytest.approx(short.item())
    assert all(
        torch.allclose(g, gradients(short, student)[name], atol=1e-12) for name, g in gradients(padded, student).items()
    )


def test_the_kernels_in_tritons_interpreter() -> None:
    """In a process of its own: triton decides at its import whether it interprets."""
    names = ("test_linear_kd_triton.py", "test_linear_kd_kernels.py")
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(f"{' and '.join(names)} run by themselves")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, so the kernels cannot even be interpreted")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(folder / name) for name in names)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout.splitlines()[-1]
