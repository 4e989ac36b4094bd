"""The public loss, its traps and true steps through the fused kernels: on a GPU, or in Triton's interpreter."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import trainer_of
from conversations import config_on, conversation
from kd_calls import flat_linear_kd
from loss_oracle import sparse_kl
from teachers import write_chat_teacher
from test_linear_kd import DIVERGENCES, IGNORE, cast, error, gradients, oracle, problem, top_k
from test_linear_kd_triton import BF16, DEVICE, GPU, assert_close, exact, inputs_of, kernels, needs_gpu
from torch import Tensor
from torch.nn import functional

from forge.losses import linear_kd as module
from forge.losses import products
from forge.losses.kd_settings import Chunks, Needs, Settings, row_pitch, teacher_share

pytestmark = [pytest.mark.gpu] if GPU else []
FORMS = [(torch.float32, "fp32"), (BF16, "fp32"), (BF16, "difference")]
# Of loss and gradients: float32 products, and bfloat16 gradients, which the interpreter truncates and a GPU rounds.
LIMITS = {torch.float32: (1e-5, 1e-5), BF16: (1e-3, 4e-3 if GPU else 8e-3)}


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions that the kernels were called in. Where there is no GPU, the tensors of the CPU take them too."""
    calls: list[str] = []
    real = kernels().fused_linear_kd

    def spy(inputs: Any, settings: Any, needs: Any, chunks: Any, precision: str) -> Any:
        calls.append(precision)
        return real(inputs, settings, needs, chunks, precision)

    monkeypatch.setattr(kernels(), "fused_linear_kd", spy)
    if not GPU:
        half = (torch.float32, BF16, torch.float16)
        monkeypatch.setattr(products, "refusal_of_kernels", lambda device, dtype: None if dtype in half else "float64")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return calls


def rounded(x: Tensor) -> Tensor:
    """float32 in bfloat16, as the kernels store it: the interpreter cuts the lower bits off."""
    return x.to(BF16) if GPU else (x.view(torch.int32) & -65536).view(torch.float32).to(BF16)


@pytest.mark.parametrize("N", [1, 9])
@pytest.mark.parametrize(("dtype", "precision"), FORMS)
@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_loss_and_gradients_equal_float64(
    divergence: str, mix: float, dtype: torch.dtype, precision: str, N: int, ran: list[str]
) -> None:
    """An odd vocabulary, a teacher of another one, ignored rows, and a normalizer that is not their number."""
    x = cast(problem(N=N, V=57, Vt=71, Hs=24, Ht=40, ignored=4 if N > 1 else 0), dtype, DEVICE)
    settings: dict[str, Any] = {"divergence": divergence, "beta": mix, "skew": mix, "precision": precision}
    normalizer = torch.tensor(5.0, device=DEVICE)
    loss, parts = flat_linear_kd(**x, alpha=0.3, temperature=2.0, normalizer=normalizer, **settings)
    expected, ce, kl, expected_gradients = oracle(x, 0.3, 2.0, divergence, mix, normalizer=5.0)

    assert ran == [precision]
    sums, gradient = LIMITS[dtype]
    assert loss.item() == pytest.approx(expected, rel=sums)
    assert (parts.ce_sum.item(), parts.divergence_sum.item()) == (
        pytest.approx(ce, rel=sums),
        pytest.approx(kl, rel=sums),
    )
    for name, found in gradients(loss, x).items():
        assert error(found, expected_gradients[name]) < gradient, name


def test_a_vocabulary_of_many_tiles() -> None:
    x = cast(problem(N=2, V=3001, ignored=0, Hs=16, Ht=16), BF16, DEVICE)
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0, precision="difference")
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert error(gradients(loss, x)["student_hidden"], expected_gradients["student_hidden"]) < LIMITS[BF16][1]


@pytest.mark.parametrize(("dtype", "precision"), FORMS)
def test_alpha_at_its_ends(dtype: torch.dtype, precision: str) -> None:
    x = cast(problem(N=6, V=57), dtype, DEVICE)
    for alpha in (0.0, 1.0):
        loss, parts = flat_linear_kd(**x, alpha=alpha, temperature=2.0, precision=precision)
        expected, _, kl, expected_gradients = oracle(x, alpha, 2.0)
        assert loss.item() == pytest.approx(expected, rel=LIMITS[dtype][0])
        assert parts.ce_sum.item() == pytest.approx(oracle(x, 0.0, 2.0)[1], rel=LIMITS[dtype][0])
        assert parts.divergence_sum.item() == pytest.approx(kl, rel=LIMITS[dtype][0])
        for name, found in gradients(loss, x).items():
            assert error(found, expected_gradients[name]) < LIMITS[dtype][1], name


def test_backward_can_run_twice_and_through_a_sum_and_rounds_once() -> None:
    x = cast(problem(N=6, V=57), BF16, DEVICE)
    one = torch.tensor(1.0, device=DEVICE)
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0, normalizer=one)
    first, second = gradients(loss, x), gradients(loss, x)
    assert all(torch.equal(first[name], second[name]) for name in first)
    scaled = gradients(1.006 * loss, x)["student_head"]  # in bfloat16 1.0078125
    assert torch.equal(scaled, rounded(first["student_head"].float() * torch.tensor(1.006, device=DEVICE)))
    assert not torch.equal(scaled, rounded(first["student_head"].float() * 1.0078125))

    wide = cast(problem(N=6, V=57), torch.float32, DEVICE)
    loss, _ = flat_linear_kd(**wide, alpha=0.5, temperature=2.0)
    other, _ = flat_linear_kd(**wide, alpha=0.0)
    both, apart = gradients(3 * loss + other, wide), (gradients(loss, wide), gradients(other, wide))
    assert all(error(both[name], 3 * apart[0][name] + apart[1][name]) < 1e-6 for name in both)


def test_the_heads_gradient_is_summed_in_float32() -> None:
    """In bfloat16 a sum that is at 64 does not grow by quarters."""
    hidden = torch.ones(41, 8, dtype=BF16, device=DEVICE)
    hidden[0] = 256
    head = torch.zeros(4, 8, dtype=BF16, device=DEVICE, requires_grad=True)
    labels = torch.zeros(41, dtype=torch.int64, device=DEVICE)
    one = torch.tensor(1.0, device=DEVICE)
    flat_linear_kd(hidden, head, labels, alpha=0.0, normalizer=one, chunks=Chunks(1, 1))[0].backward()
    assert head.grad is not None
    assert head.grad[1, 0].item() == 74.0


def test_unequal_micro_batches_add_up_to_the_whole_batch() -> None:
    whole = cast(problem(N=9, V=57), torch.float32, DEVICE)
    count = (whole["labels"] != IGNORE).sum()
    loss, _ = flat_linear_kd(**whole, alpha=0.5, temperature=2.0)
    total: Any = 0.0
    for part in (slice(0, 2), slice(2, 9)):
        rows = {name: t[part] if t.shape[0] == 9 else t for name, t in whole.items()}
        total = total + flat_linear_kd(**rows, alpha=0.5, temperature=2.0, normalizer=count)[0]
    assert total.item() == pytest.approx(loss.item(), rel=1e-6)
    expected = gradients(loss, whole)
    assert all(error(g, expected[name]) < 1e-6 for name, g in gradients(total, whole).items())


def test_a_tied_head_gets_both_of_its_gradients() -> None:
    weight = problem(V=57, Hs=8)["student_head"].float().to(DEVICE)
    tokens, labels = torch.arange(12, device=DEVICE), problem(V=57)["labels"].to(DEVICE)
    head, again = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    flat_linear_kd(head[tokens], head, labels, alpha=0.0)[0].backward()
    functional.cross_entropy(again[tokens] @ again.T, labels, ignore_index=IGNORE).backward()
    assert error(head.grad, again.grad) < 1e-5


def test_the_teacher_gets_no_graph_and_an_evaluation_has_none() -> None:
    x = cast(problem(N=6, V=57), BF16, DEVICE)
    x["teacher_hidden"].requires_grad_()
    x["teacher_head"].requires_grad_()
    loss, _ = flat_linear_kd(**x, alpha=0.5)
    loss.backward()
    assert x["teacher_hidden"].grad is None
    assert x["teacher_head"].grad is None
    frozen = {name: t.detach() if name.startswith("student") else t for name, t in x.items()}
    assert not flat_linear_kd(**frozen, alpha=0.5)[0].requires_grad
    with torch.no_grad():
        evaluated, _ = flat_linear_kd(**x, alpha=0.5)
    assert not evaluated.requires_grad
    assert evaluated.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize(("teacher", "precision"), [(torch.float32, "fp32"), (BF16, "difference")])
def test_autocast_multiplies_in_bfloat16_and_keeps_master_gradients_in_float32(
    teacher: torch.dtype, precision: str, ran: list[str]
) -> None:
    """The teacher is as it was given: one in float32 has no difference to one in bfloat16."""
    x = cast(problem(N=9, V=57, Hs=24, Ht=40), torch.float32, DEVICE)
    x |= {name: x[name].to(teacher) for name in ("teacher_hidden", "teacher_head")}
    with torch.autocast(DEVICE, BF16):
        loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0)
    known = {name: t.detach().to(BF16) if name.startswith("student") else t for name, t in x.items()}
    expected, _, _, expected_gradients = oracle(known, 0.5, 2.0)
    assert ran == [precision]
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    for name, gradient in gradients(loss, x).items():
        assert gradient.dtype == torch.float32
        assert error(gradient, expected_gradients[name]) < LIMITS[BF16][1], name


def test_strided_inputs_are_read_where_they_lie(ran: list[str]) -> None:
    """Rows apart from each other, columns apart from each other, and rows that begin nowhere near 16 bytes."""
    x = {name: t.to(BF16) if t.is_floating_point() else t for name, t in problem(N=6, V=57, Hs=24, Ht=40).items()}
    x = {name: t.to(DEVICE) for name, t in x.items()}
    apart = {name: torch.stack([t, t * 7], dim=1)[:, 0] for name, t in x.items()}
    turned = {**x, **{name: x[name].T.contiguous().T for name in ("student_head", "teacher_head")}}
    shifted = {**x, **{name: functional.pad(x[name], (1, 7))[:, 1:-7] for name in ("student_hidden", "teacher_hidden")}}
    expected, _, _, expected_gradients = oracle(x, 0.5, 2.0)
    for given, precision in ((apart, "difference"), (turned, "fp32"), (shifted, "difference")):
        assert any(not t.is_contiguous() for t in given.values())
        for name in ("student_hidden", "student_head"):
            given[name] = given[name].detach().requires_grad_()
        loss, _ = flat_linear_kd(**given, alpha=0.5, temperature=2.0)
        assert ran.pop() == precision
        assert loss.item() == pytest.approx(expected, rel=1e-3)
        for name, found in gradients(loss, given).items():
            assert error(found, expected_gradients[name]) < LIMITS[BF16][1], name


@pytest.mark.parametrize("missing_mass", ["tail", "renormalise", "zero"])
def test_a_top_k_teacher_of_a_head_with_a_bias_a_scale_and_a_softcap(missing_mass: str) -> None:
    """Strided too, with an entry that is absent, and a row that has none at all."""
    x = problem(N=7, V=57)
    log_q, indices = top_k(x, 5, 2.0)
    log_q[1, -2:] = log_q[5] = -torch.inf
    x = {name: x[name] for name in ("student_hidden", "student_head", "labels")}
    x["student_bias"] = torch.linspace(-1, 1, 57).double()
    x = cast(x, torch.float32, DEVICE)
    told = {"teacher_log_probs": log_q.float().to(DEVICE).T.contiguous().T, "teacher_indices": indices.to(DEVICE)}
    shape = {"logit_scale": 0.6, "softcap": 4.0}
    loss, parts = flat_linear_kd(**x, **told, alpha=0.4, temperature=2.0, missing_mass=missing_mass, **shape)

    again = {name: t.detach().double().cpu().requires_grad_() for name, t in x.items() if name != "labels"}
    raw = again["student_hidden"] @ again["student_head"].T + again["student_bias"]
    z = 4.0 * torch.tanh(0.6 * raw / 4.0)
    labels = x["labels"].cpu()
    rows = [i for i in range(7) if labels[i] != IGNORE]
    ce = functional.cross_entropy(z, labels, ignore_index=IGNORE, reduction="sum")
    kl = sum(sparse_kl(z[i], log_q[i], indices[i], 2.0, missing_mass) for i in rows if i != 5)
    assert 5 in rows
    ((0.6 * ce + 0.4 * 4 * kl) / len(rows)).backward()
    assert parts.divergence_sum.item() == pytest.approx(kl.item(), rel=1e-5)
    for name, found in gradients(loss, x).items():
        assert error(found, again[name].grad) < 1e-5, name


def test_leaving_ignored_rows_out_of_the_products_changes_nothing() -> None:
    x = cast(problem(N=9, V=57), torch.float32, DEVICE)
    both = [flat_linear_kd(**x, alpha=0.5, temperature=2.0, compact=compact)[0] for compact in (False, True)]
    assert both[0].item() == pytest.approx(both[1].item(), rel=1e-6)
    found = [gradients(loss, x) for loss in both]
    assert all(error(found[1][name], found[0][name]) < 1e-6 for name in found[0])
    none = {**x, "labels": torch.full_like(x["labels"], IGNORE)}
    for compact in (False, True):
        loss, _ = flat_linear_kd(**none, alpha=0.5, temperature=2.0, compact=compact)
        assert loss.item() == 0
        assert all(g.abs().max() == 0 for g in gradients(loss, x).values())


def test_scratch_memory_does_not_grow_with_the_batch() -> None:
    sizes = []
    for N in (16, 64):
        inputs = inputs_of(cast(problem(N=N, V=57, Hs=24, Ht=40), BF16, DEVICE))
        for precision in ("difference", "fp32", "bf16"):
            made = kernels().Buffers(inputs, Chunks(4, 8), precision, True, free=torch.empty(0, device=DEVICE))
            held = [t for t in (made.gradients, made.student, made.teacher, made.tops) if t is not None]
            sizes.append([(t.shape, t.dtype) for t in held])
    assert sizes[:3] == sizes[3:]


STRIDE = 2**30  # elements from row to row: the third is beyond 31 bits


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Callable[[str, torch.dtype, int], Tensor]]:
    """Four rows far apart, in memory that is there where somebody writes."""

    def rows(name: str, dtype: torch.dtype, columns: int) -> Tensor:
        size = 3 * STRIDE + columns
        if GPU:
            return torch.empty(size, dtype=dtype, device="cuda").as_strided((4, columns), (STRIDE, 1))
        whole = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        return whole.as_strided((4, columns), (STRIDE, 1))

    yield rows
    for file in tmp_path.iterdir():
        file.unlink()


@pytest.mark.parametrize("precision", ["difference", "bf16"])
def test_no_offset_of_a_row_overflows_31_bits(precision: str, far: Callable[..., Tensor]) -> None:
    x = cast(problem(N=4, V=57, Hs=24, Ht=40, ignored=3), BF16, DEVICE)
    inputs, settings, pitch = inputs_of(x), Settings(0.4, 2.0), row_pitch(57)
    near = kernels().Buffers(inputs, Chunks(4, 4), precision, True, free=torch.empty(0, device=DEVICE))
    expected_sums, sums = torch.zeros(2, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    kernels().loss_chunks(inputs, settings, 0, 4, near, expected_sums)
    wide = kernels().Buffers(inputs, Chunks(4, 4), precision, True, free=torch.empty(0, device=DEVICE))
    wide.gradients = far("gradients", BF16, pitch)
    wide.teacher = far("teacher", wide.teacher.dtype, pitch)
    kernels().loss_chunks(inputs, settings, 0, 4, wide, sums)
    assert sums[:, 1].min() > 0
    assert torch.equal(sums, expected_sums)
    assert torch.equal(wide.gradients[:, :57], near.gradients[:, :57])


@pytest.fixture
def reset() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("settings", "precision", "rel"),
    [
        (("training.mixed_precision=no",), "fp32", 1e-5),
        (("training.mixed_precision=bf16", "teacher.dtype=bfloat16"), "difference", 2e-2),
        (("training.mixed_precision=no", "distillation.divergence=jsd", "model.lora.rank=4"), "fp32", 1e-5),
    ],
)
def test_a_distillation_with_the_kernels_is_the_one_without(
    settings: tuple[str, ...], precision: str, rel: float, tmp_path: Path, chat_model: Path, reset: None,
    monkeypatch: pytest.MonkeyPatch, ran: list[str],
) -> None:  # fmt: skip
    """The true trainer over two steps in several chunks each, and an evaluation."""
    monkeypatch.setattr(module, "plan_chunks", lambda N, *_, **__: Chunks(min(N, 2), min(N, 4)))
    teacher = write_chat_teacher(tmp_path / "teacher", chat_model, columns=384)
    rows = [conversation(i) for i in range(2)]
    given = ("training.max_steps=2", "training.batch_size=2", "training.adam_epsilon=1e-3", "evaluation.shown_texts=0")
    given += (f"teacher.path={teacher}", "distillation.alpha=0.7", *settings)
    config = config_on(tmp_path, chat_model, rows, rows[:1], *given)

    def run(name: str) -> tuple[list[dict[str, float]], list[dict[str, float]], dict[str, Tensor]]:
        trainer = trainer_of(config, tmp_path / name)
        trainer.train()
        weights = {key: weight.detach().clone() for key, weight in trainer.model.named_parameters()}
        return trainer.attempt.callbacks.reports, [trainer.evaluate("final")], weights

    reports, evaluations, weights = run("fused")
    assert set(ran) == {precision}
    calls = len(ran)
    monkeypatch.setattr(products, "refusal_of_kernels", lambda device, dtype: "a test forbids them")
    plain_reports, plain_evaluations, plain_weights = run("plain")
    assert len(ran) == calls
    assert len(reports) == 2
    for found, expected, names in (
        (reports, plain_reports, ("loss", "ce", "divergence", "grad_norm")),
        (evaluations, plain_evaluations, ("validation/ce", "validation/kl")),
    ):
        for one, other in zip(found, expected, strict=True):
            assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=rel)
    for key, weight in weights.items():
        torch.testing.assert_close(weight, plain_weights[key], rtol=10 * rel, atol=1e-6 if rel < 1e-3 else 1e-3)


# On a GPU alone.


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["difference", "fp32"])
@pytest.mark.parametrize(("V", "Vt"), [(32001, 32001), (32000, 32064)])
@pytest.mark.parametrize(("divergence", "mix"), DIVERGENCES)
def test_each_divergence_at_a_true_vocabulary(divergence: str, mix: float, V: int, Vt: int, precision: str) -> None:
    x = cast(problem(N=200, V=V, Vt=Vt, Hs=64, Ht=128), BF16, "cuda")
    settings: dict[str, Any] = {"divergence": divergence, "beta": mix, "skew": mix, "precision": precision}
    loss, parts = flat_linear_kd(**x, alpha=0.4, temperature=2.0, chunks=Chunks(64, 128), **settings)
    expected, ce, kl, expected_gradients = oracle(x, 0.4, 2.0, divergence, mix)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert (parts.ce_sum.item(), parts.divergence_sum.item()) == (
        pytest.approx(ce, rel=1e-4),
        pytest.approx(kl, rel=1e-3),
    )
    for name, found in gradients(loss, x).items():
        assert error(found, expected_gradients[name]) < 4e-3, name


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("missing_mass", ["tail", "renormalise", "zero"])
def test_a_top_k_at_a_true_vocabulary(missing_mass: str, precision: str) -> None:
    """The row kernel writes these columns twice, and reads the label's and theirs before any."""
    x = cast(problem(N=64, V=50257), BF16, "cuda")
    log_q, indices = top_k(x, 64, 2.0)
    inputs = dataclasses.replace(
        inputs_of(x, alpha=0.0), top_log_probs=log_q.detach().float(), top_indices=indices, teacher_dtype=torch.float32
    )
    settings, chunks = Settings(0.4, 2.0, missing_mass=missing_mass), Chunks(32, 64)
    got = kernels().fused_linear_kd(inputs, settings, Needs(True, True, False), chunks, precision)
    assert_close(got, exact(inputs, settings), *((1e-4, 4e-3) if precision == "fp32" else (5e-3, 2e-2)))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["difference", "fp32", "bf16"])
@pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl"])
def test_many_runs_give_the_same_bits(divergence: str, precision: str) -> None:
    """Where a logit was read after it was overwritten, or a barrier lacks, they would differ now and then."""
    inputs = inputs_of(cast(problem(N=512, V=50257, Hs=64, Ht=128), BF16, "cuda"))
    settings = Settings(0.4, 2.0, divergence, teacher_share(divergence, 0.0, 0.1))
    needs, chunks = Needs(True, True, False), Chunks(256, 512)
    runs = [kernels().fused_linear_kd(inputs, settings, needs, chunks, precision) for _ in range(6)]
    for field in ("ce_sum", "kl_sum", "d_hidden", "d_head"):
        assert all(torch.equal(getattr(runs[0], field), getattr(run, field)) for run in runs[1:]), field


@needs_gpu
@pytest.mark.gpu
def test_the_scale_pass_goes_beyond_31_bits() -> None:
    gradient = torch.zeros(2**31 + 4096, dtype=BF16, device="cuda")
    gradient[-4096:] = 3.0
    scaled = kernels().scaled(gradient, torch.tensor(2.0, device="cuda"), BF16)
    assert (scaled[-4096:] == 6.0).all()
    assert not scaled[:4096].any()
