"""The distillation loss in a training step: gradients, frozen heads, autocast, compilation, and what it refuses."""

import dataclasses
import logging
from typing import Any

import pytest
import torch
from kd_calls import flat_linear_kd
from test_linear_kd import IGNORE, cast, error, gradients, oracle, problem, top_k
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from forge.losses import linear_kd as module
from forge.losses.kd_arguments import Computing, Formula, HeadInput, KDLoss
from forge.losses.kd_settings import Chunks, Inputs, Needs, Settings, plain_rows, plan_chunks, row_pitch
from forge.losses.linear_kd import linear_kd
from forge.losses.linear_kd_plain import plain_linear_kd


def test_the_incoming_gradient_is_not_rounded_to_the_weights_dtype() -> None:
    x = cast(problem(), torch.bfloat16)
    factor = 1.006  # in bfloat16 1.0078125
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0, normalizer=torch.tensor(1.0))
    plain = gradients(loss, x)["student_head"].float()
    scaled = gradients(loss * factor, x)["student_head"].float()
    assert torch.equal(scaled, (plain * factor).bfloat16().float())
    assert not torch.equal(scaled, (plain * 1.0078125).bfloat16().float())


def test_backward_can_run_twice_and_through_a_sum() -> None:
    x = cast(problem(), torch.float64)
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0)
    first, second = gradients(loss, x), gradients(loss, x)
    other, _ = flat_linear_kd(**x, alpha=0.0)
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
    loss, _ = flat_linear_kd(hidden, head, labels, alpha=0.0, normalizer=torch.tensor(1.0), chunks=Chunks(1, 1))
    loss.backward()
    assert head.grad is not None
    assert head.grad[1, 0].item() == 128.0
    assert head.grad[0, 0].item() == -384.0


def test_unequal_micro_batches_add_up_to_the_whole_batch() -> None:
    whole = cast(problem(N=12), torch.float64)
    count = (whole["labels"] != IGNORE).sum()
    loss, _ = flat_linear_kd(**whole, alpha=0.5, temperature=2.0)
    total = 0.0
    for part in (slice(0, 3), slice(3, 12)):
        rows = {name: t[part] if t.shape[0] == 12 else t for name, t in whole.items()}
        total = total + flat_linear_kd(**rows, alpha=0.5, temperature=2.0, normalizer=count)[0]
    assert total.item() == pytest.approx(loss.item())
    expected = gradients(loss, whole)
    assert all(error(g, expected[name]) < 1e-12 for name, g in gradients(total, whole).items())


def test_a_tied_head_gets_both_of_its_gradients() -> None:
    x = problem(Hs=8)
    head = x["student_head"].clone().requires_grad_()
    tokens = torch.arange(12)
    loss, _ = flat_linear_kd(head[tokens], head, x["labels"], alpha=0.0)
    loss.backward()
    again = x["student_head"].clone().requires_grad_()
    functional.cross_entropy(again[tokens] @ again.T, x["labels"], ignore_index=IGNORE).backward()
    assert error(head.grad, again.grad) < 1e-12


def test_evaluation_gives_the_same_loss_without_a_graph() -> None:
    x = cast(problem(), torch.float64)
    loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0)
    with torch.no_grad():
        evaluated, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0)
    assert evaluated.item() == loss.item()
    assert not evaluated.requires_grad


def test_the_teacher_gets_no_graph() -> None:
    x = cast(problem(), torch.float64)
    x["teacher_hidden"].requires_grad_()
    x["teacher_head"].requires_grad_()
    flat_linear_kd(**x, alpha=0.5)[0].backward()
    assert x["teacher_hidden"].grad is None
    assert x["teacher_head"].grad is None
    frozen = {name: t.detach() if name.startswith("student") else t for name, t in x.items()}
    assert not flat_linear_kd(**frozen, alpha=0.5)[0].requires_grad


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
    flat_linear_kd(**x, alpha=0.5, temperature=2.0)[0].backward()

    assert error(x["student_hidden"].grad, expected) < 1e-12
    assert seen[0].d_head.numel() == 0
    with torch.no_grad():
        flat_linear_kd(**x, alpha=0.5)
    assert [seen[1].d_head.numel(), seen[1].d_hidden.numel()] == [0, 0]


def test_autocast_multiplies_in_bfloat16_and_keeps_master_gradients_in_float32() -> None:
    x = cast(problem(N=64, V=200), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = flat_linear_kd(**x, alpha=0.5, temperature=2.0)
    found = gradients(loss, x)
    rounded = {name: t.detach().bfloat16() if name.startswith("student") else t for name, t in x.items()}
    expected, _, _, expected_gradients = oracle(rounded, 0.5, 2.0)  # the teacher is as it was given

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
    loss, _ = flat_linear_kd(**strided, alpha=0.5, temperature=2.0)
    assert loss.item() == pytest.approx(expected)
    assert all(g.isfinite().all() for g in gradients(loss, strided).values())


def test_two_runs_give_the_same_bits() -> None:
    x = cast(problem(N=50, V=300), torch.float32)
    runs = [gradients(flat_linear_kd(**x, alpha=0.5, temperature=2.0, chunks=Chunks(7, 7))[0], x) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_one_graph_and_no_compilation_per_length() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(hidden: Tensor, head: Tensor, labels: Tensor, teacher: Tensor, teacher_head: Tensor) -> KDLoss:
        return linear_kd(HeadInput(hidden, head), HeadInput(teacher, teacher_head), labels, Formula(temperature=2.0))

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for N in (6, 9, 13, 20):
        x = cast(problem(N=N), torch.float64)
        parts = compiled(*x.values())
        loss = parts.loss_mean
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


def test_what_makes_no_sense_is_refused_in_one_sentence() -> None:
    x = cast(problem(), torch.float32)
    log_q, indices = top_k(x, 4, 1.0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0."),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1\."),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl"),
        ({"divergence": "jsd", "beta": 0.0}, r"beta of jsd must be in \(0, 1\), got 0"),
        ({"divergence": "jsd", "beta": 1.0}, "limits are called forward_kl and reverse_kl"),
        ({"divergence": "skew_kl", "skew": 1.0}, r"skew of skew_kl must be in \[0, 1\), got 1"),
        ({"divergence": "skew_kl", "skew": -0.1}, r"skew of skew_kl must be in \[0, 1\), got -0.1"),
        ({"divergence": "skew_reverse_kl", "skew": 1.0}, r"skew of skew_reverse_kl must be in \[0, 1\), got 1"),
        ({"divergence": "skew_reverse_kl", "skew": -0.1}, r"skew of skew_reverse_kl must be in .*, got -0.1\.$"),
        ({"precision": "fp8"}, "precision must be one of difference, fp32, bf16"),
        ({"missing_mass": "lost"}, "missing_mass must be one of tail"),
        ({"softcap": -1.0}, r"student.softcap .* got -1"),
        ({"teacher_softcap": float("nan")}, r"teacher.softcap .* got nan"),
        ({"logit_scale": float("inf")}, r"student.scale must be .* got inf"),
        ({"labels": x["labels"][:3]}, r"labels \(3,\)"),
        ({"labels": x["labels"].float()}, "must be int64"),
        ({"student_head": x["student_head"][:, :4]}, r"student.hidden \(12, 8\) and student.weight \(37, 4\)"),
        ({"student_bias": torch.zeros(3)}, r"student.bias \(3,\) must have one element for each of 37 columns"),
        ({"teacher_hidden": x["teacher_hidden"][:5]}, r"teacher.hidden \(5, 16\) must be .* student.hidden \(12, 8\)"),
        ({"teacher_hidden": None}, "alpha > 0 needs a teacher"),
        ({"student_head": x["student_head"].bfloat16()}, "cast one, or use autocast"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            flat_linear_kd(**{"alpha": 0.5, **x, **change})
        assert str(raised.value).count("\n") == 0
    student = {name: x[name] for name in ("student_hidden", "student_head", "labels")}
    with pytest.raises(ValueError, match="A top-k teacher supports forward_kl only"):
        flat_linear_kd(**student, teacher_log_probs=log_q, teacher_indices=indices, divergence="jsd")
    with pytest.raises(ValueError, match="must have one shape"):
        flat_linear_kd(**student, teacher_log_probs=log_q, teacher_indices=indices[:, :2])


def test_the_plain_path_says_once_why_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_said", set())
    x = cast(problem(), torch.float32)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for _ in range(3):
            flat_linear_kd(**x)
        flat_linear_kd(**x, precision="fp32")
        flat_linear_kd(**x, alpha=0.0, precision="difference")  # of one model there is none, and nothing is worse
        for _ in range(2):
            flat_linear_kd(**x, precision="bf16")
    reason = "its kernels need a CUDA device, and the tensors are on cpu"
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", f"linear_kd takes the plain path: {reason}."),
        ("WARNING", f"linear_kd takes the plain path, with fp32 logits instead of precision bf16: {reason}."),
    ]


def test_what_the_plain_path_allocates_does_not_grow_with_the_batch() -> None:
    class Widest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    widest = []
    for N in (64, 256):
        x = cast(problem(N=N, V=500), torch.bfloat16)
        wanted, settings = Needs(True, True, False), Settings(0.5, 2.0)
        given = Inputs(*(x[name].detach() for name in ("student_hidden", "student_head", "labels")))
        given = dataclasses.replace(given, teacher_hidden=x["teacher_hidden"], teacher_head=x["teacher_head"])
        with Widest() as seen:
            plain_linear_kd(given, settings, wanted, 16)
        widest.append(seen.elements)
    assert widest == [16 * 500, 16 * 500]


def test_plain_torch_keeps_its_budget_too() -> None:
    assert plain_rows(128256, 4) == 87  # 256 MiB
    assert plain_rows(128256, 4, 2**30) == 348
    assert plain_rows(128256, 4, low_memory=True) == 21
    assert plain_rows(128256, 4, 2**30, low_memory=True) == 21
    assert plain_rows(128256, 4, 1) == 16  # the least there is
    assert plain_rows(3, 4) == 1024
    x, rows = cast(problem(N=60, V=4000), torch.float32), []
    real = module.plain_linear_kd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plain_linear_kd", lambda *args: rows.append(args[-1]) or real(*args))
        for options in ({}, {"memory_budget": 2**22}, {"low_memory": True}, {"chunks": Chunks(7, 9)}):
            flat_linear_kd(**x, **options)
    assert rows == [1024, 43, 699, 7]


@pytest.mark.parametrize(
    ("precision", "teacher", "bytes_per_column"),
    [("difference", True, 2), ("fp32", True, 8), ("fp32", False, 4), ("bf16", True, 2), ("bf16", False, 0)],
)
def test_the_chunks_of_the_kernels_follow_precision_and_memory(
    precision: str, teacher: bool, bytes_per_column: int
) -> None:
    """The logits of both models count, in the dtype that they have between product and loss."""
    N, V, H = 8192, 128256, 2048
    hidden, head = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((N, H), (V, H)))
    given = Inputs(hidden, head, torch.empty(N, device="meta"), dtype=torch.bfloat16)
    given = dataclasses.replace(given, teacher_hidden=hidden, teacher_head=head) if teacher else given
    for needs, bytes_of_head in ((Needs(True, True, False), 2), (Needs(True, False, False), 0)):
        for computing in (Computing(), Computing(low_memory=True), Computing(memory_budget=2**30)):
            found = module.planned_chunks(given, needs, computing, precision)
            assert found == plan_chunks(
                *(N, V, H), logit_bytes=bytes_per_column, gradient_bytes=2, head_gradient_bytes=bytes_of_head,
                memory_budget=computing.memory_budget, low_memory=computing.low_memory,
            )  # fmt: skip
    assert module.planned_chunks(given, needs, Computing(low_memory=True), precision).wide <= 2048


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
