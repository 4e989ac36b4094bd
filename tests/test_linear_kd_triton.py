"""The fused kernels against float64: compiled on a GPU, and in Triton's interpreter where there is none."""

import dataclasses
import importlib
import os
from types import ModuleType
from typing import Any

import pytest
import torch
from kd_calls import flat_linear_kd
from test_linear_kd import DIVERGENCES, IGNORE, cast, error, gradients, oracle, problem, top_k
from torch import Tensor

from forge.losses import linear_kd as module
from forge.losses.kd_arguments import Formula, HeadInput, KDLoss
from forge.losses.kd_settings import Chunks, Inputs, Needs, Outputs, Settings, teacher_share
from forge.losses.linear_kd import linear_kd
from forge.losses.linear_kd_plain import plain_linear_kd

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
BF16 = torch.bfloat16
needs_gpu = pytest.mark.skipif(not GPU, reason="there is no CUDA device")
pytestmark = [pytest.mark.gpu] if GPU else []


if not (GPU or INTERPRETED):
    pytest.skip("the kernels run on a GPU, or in a process that test_linear_kd.py starts", allow_module_level=True)


def kernels() -> ModuleType:
    return importlib.import_module("forge.losses.linear_kd_triton")


def inputs_of(x: dict[str, Tensor], alpha: float = 0.5) -> Inputs:
    """What the public function would hand down."""
    dtype = x["student_hidden"].dtype
    teacher = {} if alpha == 0 else {n: x[n].detach() for n in ("teacher_hidden", "teacher_head")}
    student = [x[f"student_{n}"].detach() for n in ("hidden", "head")]
    biases = [None if n not in x else x[n].detach() for n in ("student_bias", "teacher_bias")]
    return Inputs(*student, x["labels"], biases[0], **teacher, teacher_bias=biases[1], dtype=dtype, teacher_dtype=dtype)


def fused(inputs: Inputs, settings: Settings, chunks: Chunks, precision: str, needs: Needs | None = None) -> Outputs:
    needs = needs or Needs(True, True, inputs.bias is not None)
    return kernels().fused_linear_kd(inputs, settings, needs, chunks, precision)


def exact(inputs: Inputs, settings: Settings) -> Outputs:
    """The plain twin on the same inputs, widened to float64."""
    wide = {
        field.name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for field in dataclasses.fields(inputs)
        for value in [getattr(inputs, field.name)]
    }
    wide |= {"dtype": torch.float64, "teacher_dtype": torch.float64}
    return plain_linear_kd(Inputs(**wide), settings, Needs(True, True, inputs.bias is not None), 1024)


def assert_close(got: Outputs, expected: Outputs, sums: float, gradient: float) -> None:
    for field in dataclasses.fields(Outputs):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        limit = gradient if field.name.startswith("d_") else sums
        assert error(a, b) < limit, (field.name, error(a, b))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_fp32_logits_equal_float64(divergence: str, mix: float, temperature: float) -> None:
    x = cast(problem(N=9, V=70), torch.float32, DEVICE)
    settings = Settings(0.4, temperature, divergence, teacher_share(divergence, mix, mix))
    got = fused(inputs_of(x), settings, Chunks(3, 6), "fp32")
    _, ce, kl, expected_gradients = oracle(x, 0.4, temperature, divergence, mix, normalizer=1.0)

    assert got.ce_sum.item() == pytest.approx(ce, rel=1e-5)
    assert got.kl_sum.item() == pytest.approx(kl, rel=1e-5)
    assert error(got.d_hidden, expected_gradients["student_hidden"]) < 3e-6
    assert error(got.d_head, expected_gradients["student_head"]) < 3e-6


@pytest.mark.parametrize(
    ("V", "Vt", "divergence", "mix"),
    [(70, 57, *divergence) for divergence in DIVERGENCES]  # each of them, and each vocabulary with one of each kind
    + [
        (V, Vt, *divergence)
        for V, Vt in [(96, 96), (70, 70), (64, 80)]
        for divergence in (DIVERGENCES[0], ("jsd", 0.3))
    ],
)
def test_the_difference_form_equals_float64_also_with_odd_and_padded_vocabularies(
    V: int, Vt: int, divergence: str, mix: float
) -> None:
    x = cast(problem(N=19, V=V, Vt=Vt, Hs=24, Ht=40), BF16, DEVICE)
    settings = Settings(0.4, 2.0, divergence, teacher_share(divergence, mix, mix))
    got = fused(inputs_of(x), settings, Chunks(19, 19), "difference")
    _, ce, kl, expected_gradients = oracle(x, 0.4, 2.0, divergence, mix, normalizer=1.0)

    assert got.ce_sum.item() == pytest.approx(ce, rel=3e-4)
    assert got.kl_sum.item() == pytest.approx(kl, rel=1e-3)
    assert error(got.d_hidden, expected_gradients["student_hidden"]) < 5e-3
    assert error(got.d_head, expected_gradients["student_head"]) < 5e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_the_difference_form_holds_near_convergence_where_bf16_logits_fail(temperature: float) -> None:
    """Logits of standard deviation 10 that differ by 0.1: the loss would not tell, the gradient does."""
    g = torch.Generator().manual_seed(0)
    N, V, H = 16, 128, 64
    hidden = torch.randn(N, H, generator=g).to(BF16)
    teacher = torch.randn(V, H, generator=g) * (10 / H**0.5)
    near = teacher.to(BF16).float() + torch.randn(V, H, generator=g) * (0.1 / H**0.5)
    x = {"student_hidden": hidden, "student_head": near, "labels": torch.arange(N)}
    x |= {"teacher_hidden": hidden, "teacher_head": teacher}
    x = cast(x, BF16, DEVICE)
    expected = oracle(x, 1.0, temperature, normalizer=1.0)[3]
    found = {
        precision: fused(inputs_of(x), Settings(1.0, temperature), Chunks(16, 16), precision)
        for precision in ("difference", "fp32", "bf16")
    }
    errors = {precision: error(got.d_hidden, expected["student_hidden"]) for precision, got in found.items()}
    assert errors["difference"] < 0.006
    assert errors["fp32"] < 0.004
    assert errors["bf16"] > 0.05


@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
@pytest.mark.parametrize("precision", ["difference", "fp32"])
def test_equal_models_have_no_divergence(precision: str, divergence: str, mix: float) -> None:
    x = problem(N=8, V=70, Hs=24, Ht=24)
    x["teacher_hidden"], x["teacher_head"] = x["student_hidden"].clone(), x["student_head"].clone()
    inputs = inputs_of(cast(x, BF16, DEVICE))
    got = fused(inputs, Settings(1.0, 2.0, divergence, teacher_share(divergence, mix, mix)), Chunks(8, 8), precision)
    assert abs(got.kl_sum.item()) < 2e-6
    assert got.d_hidden.abs().max() < 1e-5


@pytest.mark.parametrize("V", [70, 57])
def test_bias_scale_and_softcap(V: int) -> None:
    x = problem(N=6, V=V, Vt=64)
    x["student_bias"], x["teacher_bias"] = torch.linspace(-1, 1, V).double(), torch.linspace(2, -1, 64).double()
    inputs = inputs_of(cast(x, torch.float32, DEVICE))
    settings = Settings(0.4, 2.0, logit_scale=0.6, softcap=4.0, teacher_logit_scale=1.5, teacher_softcap=3.0)
    assert_close(fused(inputs, settings, Chunks(4, 4), "fp32"), exact(inputs, settings), 1e-5, 1e-5)


def test_scales_in_the_difference_form() -> None:
    inputs = inputs_of(cast(problem(N=6, V=70, Hs=24, Ht=24), BF16, DEVICE))
    settings = Settings(0.4, 2.0, logit_scale=0.5, teacher_logit_scale=1.5)
    assert_close(fused(inputs, settings, Chunks(4, 6), "difference"), exact(inputs, settings), 1e-3, 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_cross_entropy_alone(dtype: torch.dtype) -> None:
    """In bf16 the student's logits lie where their gradients go: the label's is read before it is overwritten."""
    x = cast(problem(N=9, V=70), dtype, DEVICE)
    inputs, settings = inputs_of(x, alpha=0.0), Settings(0.0)
    for precision in ("fp32", "bf16"):
        got = fused(inputs, settings, Chunks(2, 5), precision)
        limit = (1e-5, 3e-6) if dtype == torch.float32 else (2e-3, 1e-2)
        assert_close(got, exact(inputs, settings), *limit)
        assert got.kl_sum.item() == 0


def test_no_skew_is_the_plain_divergence() -> None:
    inputs = inputs_of(cast(problem(N=6, V=70), torch.float32, DEVICE))
    for skewed, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        got = fused(inputs, Settings(0.4, 2.0, skewed, teacher_share(skewed, 0.0, 0.0)), Chunks(6, 6), "fp32")
        assert_close(got, fused(inputs, Settings(0.4, 2.0, plain), Chunks(6, 6), "fp32"), 1e-7, 1e-7)


@pytest.mark.parametrize(("step", "pulls"), [(3e-5, False), (3e-4, True)])
def test_total_variation_takes_no_sign_from_rounding(step: float, pulls: bool) -> None:
    """The models differ by step in one logit, less or more than kd_settings.EQUAL."""
    x = problem(N=6, V=70, Hs=24, Ht=24)
    x["teacher_hidden"], x["teacher_head"] = x["student_hidden"].clone(), x["student_head"].clone()
    x["student_bias"], x["teacher_bias"] = torch.zeros(70).double(), torch.zeros(70).double()
    x["student_bias"][3] = step
    got = fused(inputs_of(cast(x, torch.float32, DEVICE)), Settings(1.0, 1.0, "tvd"), Chunks(6, 6), "fp32")
    assert (got.d_bias[3].item() > 0) == pulls
    assert pulls or got.d_hidden.abs().max() == 0


def test_bf16_logits_are_overwritten_only_after_they_were_read() -> None:
    inputs = inputs_of(cast(problem(N=9, V=70), BF16, DEVICE))
    for missing in (Settings(0.4, 2.0), Settings(0.4, 2.0, "jsd", 0.3)):
        assert_close(fused(inputs, missing, Chunks(4, 8), "bf16"), exact(inputs, missing), 5e-3, 2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("missing_mass", ["tail", "renormalise", "zero"])
def test_a_top_k_teacher(missing_mass: str, precision: str) -> None:
    x = cast(problem(N=9, V=70), BF16 if precision == "bf16" else torch.float32, DEVICE)
    log_q, indices = top_k(x, 5, 2.0)
    log_q[1, -2:] = -torch.inf  # absent entries, at an index that is present too
    indices[1, -2:] = indices[1, 0]
    inputs = dataclasses.replace(
        inputs_of(x, alpha=0.0), top_log_probs=log_q.detach().float(), top_indices=indices, teacher_dtype=torch.float32
    )
    settings = Settings(0.4, 2.0, missing_mass=missing_mass)
    limits = (1e-5, 1e-5) if precision == "fp32" else (5e-3, 2e-2)
    assert_close(fused(inputs, settings, Chunks(4, 8), precision), exact(inputs, settings), *limits)


def test_ignored_rows_have_no_part_in_anything() -> None:
    x = problem(N=8, V=70, Hs=24, Ht=24, ignored=2)
    for precision in ("difference", "fp32"):
        inputs = inputs_of(cast(x, BF16, DEVICE))
        got = fused(inputs, Settings(0.4, 2.0), Chunks(3, 8), precision)
        assert_close(got, exact(inputs, Settings(0.4, 2.0)), 1e-3, 6e-3)
        assert got.d_hidden[::2].abs().max() == 0
        none = dataclasses.replace(inputs, labels=torch.full_like(inputs.labels, IGNORE))
        got = fused(none, Settings(0.4, 2.0), Chunks(3, 8), precision)
        assert [t.abs().max().item() for t in (got.ce_sum, got.kl_sum, got.d_hidden, got.d_head)] == [0.0] * 4


def test_a_token_that_both_models_exclude_makes_no_nan() -> None:
    x = problem(N=6, V=70)
    x["student_bias"] = torch.zeros(70, dtype=torch.float64)
    x["student_bias"][x["labels"].max() + 1 :] = -torch.inf
    x["teacher_bias"] = x["student_bias"].clone()
    x["labels"] = x["labels"].clamp(max=40)
    x["student_bias"][41:] = x["teacher_bias"][41:] = -torch.inf
    inputs = inputs_of(cast(x, torch.float32, DEVICE))
    for divergence, mix in DIVERGENCES:
        settings = Settings(0.4, 2.0, divergence, teacher_share(divergence, mix, mix))
        got = fused(inputs, settings, Chunks(6, 6), "fp32")
        fewer = {name: t[:41] if t.shape[0] == 70 else t for name, t in x.items()}
        _, ce, kl, expected = oracle(fewer, 0.4, 2.0, divergence, mix, normalizer=1.0)
        assert (got.ce_sum.item(), got.kl_sum.item()) == (pytest.approx(ce, rel=1e-5), pytest.approx(kl, rel=1e-5))
        assert error(got.d_hidden, expected["student_hidden"]) < 1e-5


def test_a_label_outside_the_vocabulary_gives_nan_and_reads_nothing_else() -> None:
    x = cast(problem(N=4, V=70, ignored=0), torch.float32, DEVICE)
    x["labels"][1] = 70
    assert fused(inputs_of(x), Settings(0.4), Chunks(4, 4), "fp32").ce_sum.isnan()


def test_evaluation_writes_no_gradients_and_a_frozen_head_gets_none() -> None:
    inputs = inputs_of(cast(problem(N=9, V=70, Hs=24, Ht=24), BF16, DEVICE))
    for precision in ("difference", "fp32"):
        trained = fused(inputs, Settings(0.4, 2.0), Chunks(4, 8), precision)
        evaluated = fused(inputs, Settings(0.4, 2.0), Chunks(4, 8), precision, Needs(False, False, False))
        frozen = fused(inputs, Settings(0.4, 2.0), Chunks(4, 8), precision, Needs(True, False, False))
        assert evaluated.kl_sum.item() == pytest.approx(trained.kl_sum.item(), rel=1e-6)
        assert evaluated.ce_sum.item() == pytest.approx(trained.ce_sum.item(), rel=1e-6)
        assert [evaluated.d_hidden.numel(), evaluated.d_head.numel(), frozen.d_head.numel()] == [0, 0, 0]
        assert torch.equal(frozen.d_hidden, trained.d_hidden)


@pytest.mark.parametrize("precision", ["difference", "fp32"])
def test_chunks_change_nothing_but_rounding_and_two_runs_give_the_same_bits(precision: str) -> None:
    inputs = inputs_of(cast(problem(N=11, V=70, Hs=24, Ht=24), BF16, DEVICE))
    runs = [fused(inputs, Settings(0.4, 2.0), chunks, precision) for chunks in (Chunks(4, 8), Chunks(11, 99))]
    assert error(runs[0].d_head, runs[1].d_head) < 3e-3
    again = fused(inputs, Settings(0.4, 2.0), Chunks(4, 8), precision)
    for field in dataclasses.fields(Outputs):
        assert torch.equal(getattr(runs[0], field.name), getattr(again, field.name))


def test_the_scale_pass_rounds_once_and_leaves_what_it_reads() -> None:
    gradient = torch.randn(37, 11).to(BF16).to(DEVICE)
    before = gradient.clone()
    factor = torch.tensor(1.006, device=DEVICE)  # in bfloat16 1.0078125
    assert torch.equal(kernels().scaled(gradient, factor, torch.float32), gradient.float() * factor)
    if GPU:  # the interpreter truncates to bfloat16
        assert torch.equal(kernels().scaled(gradient, factor, BF16), (gradient.float() * factor).to(BF16))
    assert torch.equal(gradient, before)


def test_the_difference_form_says_what_it_cannot_do() -> None:
    x = cast(problem(N=4, V=70, Hs=24, Ht=24), BF16, DEVICE)
    refusal = kernels().refusal_of_difference
    assert refusal(inputs_of(x), Settings()) is None
    assert refusal(inputs_of(x, alpha=0.0), Settings()) == "it needs a teacher's hidden states and head"
    assert "softcap" in refusal(inputs_of(x), Settings(softcap=3.0))
    assert "16-byte aligned" in refusal(inputs_of(cast(problem(Hs=7, Ht=16), BF16, DEVICE)), Settings())
    assert "bfloat16" in refusal(inputs_of(cast(problem(), torch.float32, DEVICE)), Settings())


# On a GPU alone: the public function, true sizes, memory.


def gpu_problem(N: int, V: int, Hs: int = 64, Ht: int = 128) -> dict[str, Tensor]:
    return cast(problem(N=N, V=V, Hs=Hs, Ht=Ht), BF16, "cuda")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("V", [32000, 32001, 50257])
@pytest.mark.parametrize("precision", [None, "fp32"])
def test_the_public_function_on_a_gpu(precision: str | None, V: int) -> None:
    x = gpu_problem(300, V)
    loss, parts = flat_linear_kd(**x, alpha=0.4, temperature=2.0, precision=precision, chunks=Chunks(64, 128))
    expected, ce, kl, expected_gradients = oracle(x, 0.4, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert parts.ce_sum.item() == pytest.approx(ce, rel=1e-4)
    assert parts.divergence_sum.item() == pytest.approx(kl, rel=1e-4)
    for name, gradient in gradients(loss, x).items():
        assert error(gradient, expected_gradients[name]) < 4e-3
    compact, _ = flat_linear_kd(**x, alpha=0.4, temperature=2.0, precision=precision, compact=True)
    assert compact.item() == pytest.approx(loss.item(), rel=1e-5)


@needs_gpu
@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    """4,100 rows of 600,000 columns: the last row begins at 2.46e9."""
    x = gpu_problem(4100, 600_000, 16, 16)
    last = {n: t[-1:] if t.shape[0] == 4100 else t for n, t in x.items()}
    found = fused(inputs_of(x), Settings(0.4, 2.0), Chunks(4100, 4100), "difference", Needs(True, False, False))
    alone = fused(inputs_of(last), Settings(0.4, 2.0), Chunks(1, 1), "difference", Needs(True, False, False))
    assert error(found.d_hidden[-1:], alone.d_hidden) < 1e-3


@needs_gpu
@pytest.mark.gpu
def test_memory_does_not_grow_with_the_batch_and_a_frozen_head_allocates_no_gradient() -> None:
    def peak(N: int, frozen: bool = False) -> int:
        x = gpu_problem(N, 32000)
        x["student_head"].requires_grad_(not frozen)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        flat_linear_kd(**x, alpha=0.4, temperature=2.0, memory_budget=2**28)[0].backward()
        return torch.cuda.max_memory_allocated() - before - 2 * x["student_hidden"].nbytes

    peak(1024)
    assert peak(32768) < 1.05 * peak(8192)
    assert peak(8192, frozen=True) < peak(8192)


@needs_gpu
@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    x = gpu_problem(256, 32000)
    flat_linear_kd(**x, alpha=0.4, temperature=2.0)[0].backward()
    normalizer = torch.tensor(100, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        flat_linear_kd(**x, alpha=0.4, temperature=2.0, normalizer=normalizer)[0].backward()
        flat_linear_kd(**x, alpha=0.0)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.gpu
def test_one_graph_on_a_gpu() -> None:
    def call(hidden: Tensor, head: Tensor, labels: Tensor, teacher: Tensor, teacher_head: Tensor) -> KDLoss:
        formula = Formula(alpha=0.4, temperature=2.0)
        return linear_kd(HeadInput(hidden, head), HeadInput(teacher, teacher_head), labels, formula)

    compiled = torch.compile(call, fullgraph=True)
    for N in (64, 96, 128):
        x = gpu_problem(N, 1000)
        loss = compiled(*x.values()).loss_mean
        plain, _ = flat_linear_kd(**x, alpha=0.4, temperature=2.0)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
        expected = gradients(plain, x)
        assert all(torch.equal(g, expected[name]) for name, g in gradients(loss, x, retain=False).items())


@needs_gpu
@pytest.mark.gpu
def test_what_the_difference_form_cannot_do_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_said", set())
    x: dict[str, Any] = gpu_problem(64, 1000)
    for _ in range(2):
        loss, _ = flat_linear_kd(
            **x, alpha=0.4, temperature=2.0, softcap=8.0, teacher_softcap=8.0, precision="difference"
        )
    assert loss.item() == pytest.approx(oracle(x, 0.4, 2.0, cap=8.0)[0], rel=1e-4)
    assert [record.message for record in caplog.records] == [
        "linear_kd uses fp32 logits instead of precision difference: a bias or a softcap comes between hidden states "
        "and logits."
    ]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("excluded_by", ["student", "teacher", "both"])
@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_a_masked_vocabulary_gives_what_the_plain_path_gives(
    divergence: str, mix: float, excluded_by: str, temperature: float
) -> None:
    """Also where that is infinite: forward_kl if the student excludes a token, reverse_kl if the teacher does."""
    x = cast(problem(N=5, V=70), torch.float32, DEVICE)
    x["labels"] = x["labels"].clamp(max=9)
    for whose in ("student", "teacher"):
        x[f"{whose}_bias"] = torch.zeros(70, device=DEVICE)
        if excluded_by in (whose, "both"):
            x[f"{whose}_bias"][10:40] = -torch.inf
    settings = Settings(0.4, temperature, divergence, teacher_share(divergence, mix, mix))
    got, expected = fused(inputs_of(x), settings, Chunks(5, 5), "fp32"), exact(inputs_of(x), settings)
    for field in dataclasses.fields(Outputs):
        one, other = getattr(got, field.name).double(), getattr(expected, field.name).double()
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4, equal_nan=True)
