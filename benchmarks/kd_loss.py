"""Prints time and memory of the distillation loss and of its alternatives, forward and backward.

    python benchmarks/kd_loss.py                                   on a CUDA device, all shapes
    python benchmarks/kd_loss.py --shape 8192,128256,2048,4096     N, V, and the widths of student and teacher
    python benchmarks/kd_loss.py --device cpu                      the plain path on small shapes

Times are those of the device, with a cold L2 and a queue that is never empty, as within a training step; the column
`host` is how long Python takes to enqueue a call. The floor is the four matrix products that every loss needs, computed
by cuBLAS in one chunk, in bfloat16. A GPU at its power limit changes its clock from call to call, so each call follows
a call of its floor, and `x floor` is the median of their ratios. Peak memory is in addition to the inputs and includes
the gradients. Rows of other libraries are printed if these can be imported.

Everything that is timed is checked: each row's loss and gradients are compared with float64 (exact_loss.py), and the
column `error` has the larger relative error of the gradients. A row of forge that is wrong, or does not run, is marked
and makes the exit code 1; rows of others are only marked. With bfloat16 logits, an error of some 2 % is the cost of the
format on these shapes.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from exact_loss import IGNORE, exact_loss, relative_error
from torch import Tensor
from torch.nn import functional

from forge.losses.kd_arguments import Computing, Formula, HeadInput, TopK
from forge.losses.linear_kd import linear_kd

ALPHA, TEMPERATURE = 0.5, 2.0
SHAPES = ["8192,128256,2048,4096", "8192,151936,2048,4096", "4096,49152,576,960", "1024,151936,896,3584"]
CPU_SHAPES = ["128,4000,64,128", "64,8001,96,64"]
LOSS_LIMIT = 2e-3  # the largest relative error of a correct loss
GRADIENT_LIMIT, BF16_LIMIT = 0.01, 0.05  # of a correct gradient; the second if both models' logits are bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", action="append")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="only rows whose name has one of these words (a,b)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "is not installed"
    print(f"torch {torch.__version__}, triton {triton}, {where}; alpha={ALPHA} T={TEMPERATURE}, bfloat16 inputs")
    wrong: list[str] = []
    for shape in arguments.shape or (SHAPES if device.type == "cuda" else CPU_SHAPES):
        N, V, Hs, Ht = map(int, shape.split(","))
        wrong += table(N, V, Hs, Ht, device, arguments.repeats, [word for word in arguments.only.split(",") if word])
    if wrong:
        sys.exit(f"not to be believed: {'; '.join(wrong)}")


def table(N: int, V: int, Hs: int, Ht: int, device: torch.device, repeats: int, only: list[str]) -> list[str]:
    """Print the table of one shape; return forge's rows that are wrong or did not run."""
    torch.manual_seed(0)
    x = {
        "student_hidden": torch.randn(N, Hs, device=device).bfloat16().requires_grad_(),
        # logits of standard deviation 3: a peaked softmax, as models have
        "student_head": (torch.randn(V, Hs, device=device) * (3 / Hs**0.5)).bfloat16().requires_grad_(),
        "labels": torch.randint(0, V, (N,), device=device),
        "teacher_hidden": torch.randn(N, Ht, device=device).bfloat16(),
        "teacher_head": (torch.randn(V, Ht, device=device) * (3 / Ht**0.5)).bfloat16(),
    }
    x["labels"][::16] = IGNORE
    products = 2.0 * N * V * (3 * Hs + Ht)
    print(f"\nN={N} V={V} Hs={Hs} Ht={Ht}: {products / 1e12:.2f} TFLOP")
    print(
        f"{'':<44} {'median ms':>9} {'min':>8} {'x floor':>8} {'peak MiB':>9} {'host ms':>8} {'loss':>9} {'error':>8}"
    )
    clock = Clock(device, repeats)
    floors = {
        "both": floor_call(x, True, True),
        "ce": floor_call(x, False, True),
        "frozen": floor_call(x, True, False),
    }
    exact = Exact(x)
    wrong = []
    for name, needs, reference, make in rows(x, exact, device, floors):
        if only and not any(word in name for word in (*only, "floor")):
            continue
        try:
            call = make()
            median, least, ratio, peak, host = clock.measure(call, floors.get(needs), x)
            told, right = verdict(name, call, exact.of(reference), x) if reference else ("", True)
        except Exception as problem:  # noqa: BLE001 - the other rows are still to be printed
            print(f"{name:<44} not run: {type(problem).__name__}: {str(problem).splitlines()[0][:100]}")
            right = False
            continue
        finally:
            call = None
            forget(x)
            gc.collect()
            torch.cuda.empty_cache()
            if not right and name.startswith("forge"):
                wrong.append(f"{name} at {N},{V},{Hs},{Ht}")
        print(f"{name:<44} {median:>9.2f} {least:>8.2f} {ratio:>8} {peak:>9.0f} {host:>8.2f} {told}", flush=True)
    return wrong


def verdict(
    name: str, call: Callable[[], Tensor | None], exact: tuple[float, Tensor, Tensor], x: dict[str, Tensor]
) -> tuple[str, bool]:
    """Return loss and largest gradient error of a call, as they are printed, and whether they are right."""
    forget(x)
    loss = run(call)
    assert loss is not None
    found, pairs = loss.item(), ((x["student_hidden"].grad, exact[1]), (x["student_head"].grad, exact[2]))
    error = max(relative_error(gradient, true) for gradient, true in pairs if gradient is not None)
    limit = GRADIENT_LIMIT if name.startswith("forge") and "bf16" not in name else BF16_LIMIT
    right = abs(found - exact[0]) < LOSS_LIMIT * abs(exact[0]) and error < limit
    return f"{found:>9.4f} {error:>8.3%}" + ("" if right else "  WRONG"), right


class Exact:
    """Losses and gradients in float64, each computed once and kept in float32."""

    def __init__(self, x: dict[str, Tensor]) -> None:
        self.x = x
        self.half = {**x, "labels": x["labels"].clone()}
        self.half["labels"][::2] = IGNORE
        self.top_k = teacher_top_k(x, 64)
        self.known: dict[str, tuple[float, Tensor, Tensor]] = {}

    def of(self, what: str) -> tuple[float, Tensor, Tensor]:
        if what not in self.known:
            T = TEMPERATURE
            if what == "half":
                found = exact_loss(self.half, ALPHA, T)
            elif what == "ce":
                found = exact_loss(self.x, 0.0, T)
            elif what == "top k":
                found = exact_loss(self.x, ALPHA, T, top=self.top_k)
            else:
                found = exact_loss(self.x, ALPHA, T, what)
            self.known[what] = found[0], found[2].float(), found[3].float()
        return self.known[what]


Row = tuple[str, str, str, Callable[[], Callable[[], Tensor | None]]]


def rows(x: dict[str, Tensor], exact: Exact, device: torch.device, floors: dict[str, Callable[[], None]]) -> list[Row]:
    """Return for each row its name, its floor, its exact loss, and a function that makes the call to time.

    The call returns the loss, or None for a floor.
    """
    T, half, same = TEMPERATURE, exact.half, "forward_kl"
    frozen = {**x, "student_head": x["student_head"].detach()}
    whole = HeadInput(x["teacher_hidden"], x["teacher_head"])

    def ours(
        tensors: dict[str, Tensor] = x,
        divergence: str = "forward_kl",
        alpha: float = ALPHA,
        teacher: HeadInput | TopK | None = whole,
        **options: Any,
    ) -> Callable[[], Tensor]:
        student = HeadInput(tensors["student_hidden"], tensors["student_head"])
        formula, computing = Formula(alpha, T, divergence, skew=0.5), Computing(**options)
        return lambda: linear_kd(student, teacher, tensors["labels"], formula, computing).loss_mean

    listed: list[Row] = [
        ("floor: four products, one chunk", "both", "", lambda: floors["both"]),
        ("floor: without the teacher's", "ce", "", lambda: floors["ce"]),
        ("floor: without dW", "frozen", "", lambda: floors["frozen"]),
    ]
    precisions = ["difference", "fp32", "bf16"] if device.type == "cuda" else [None]
    listed += [(f"forge, {p or 'plain path'}", "both", same, lambda p=p: ours(precision=p)) for p in precisions]
    listed += [
        ("forge, low_memory", "both", same, lambda: ours(low_memory=True)),
        ("forge, jsd", "other", "jsd", lambda: ours(divergence="jsd")),
        ("forge, reverse_kl", "other", "reverse_kl", lambda: ours(divergence="reverse_kl")),
        ("forge, skew_kl", "other", "skew_kl", lambda: ours(divergence="skew_kl")),
        ("forge, skew_reverse_kl", "other", "skew_reverse_kl", lambda: ours(divergence="skew_reverse_kl")),
        ("forge, tvd", "other", "tvd", lambda: ours(divergence="tvd")),
        ("forge, 50 % ignored rows, compact", "half", "half", lambda: ours(half, compact=True)),
        ("forge, 50 % ignored rows, as they are", "half", "half", lambda: ours(half)),
        ("forge, frozen head", "frozen", same, lambda: ours(frozen)),
        ("forge, top-64 teacher", "ce", "top k", lambda: ours(teacher=TopK(*exact.top_k))),
        ("forge, alpha = 0 (CE alone)", "ce", "ce", lambda: ours(alpha=0.0, teacher=None)),
        ("eager, logits materialised", "both", same, lambda: lambda: materialised(x)),
    ]
    if device.type == "cuda":
        listed += [
            ("torch.compile, logits materialised", "both", same, lambda: compiled(materialised, x)),
            ("torch.compile, chunks of 2048", "both", same, lambda: compiled_chunks(x, 2048)),
            ("torch.compile, chunks of 1024", "both", same, lambda: compiled_chunks(x, 1024)),
            ("Liger chunked LigerFusedLinearJSDLoss, 2048", "both", same, lambda: liger(x, 2048)),
            ("Liger chunked LigerFusedLinearJSDLoss, 1024", "both", same, lambda: liger(x, 1024)),
            ("TRL ChunkedDivergence (D alone)", "other", "", lambda: trl(x)),
        ]
    return listed


class Clock:
    """Measures a forward and backward: median and minimal device time, additional peak memory, and the host's time."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.cuda = device.type == "cuda"
        self.repeats = repeats if self.cuda else 3
        # Writing 4 GiB flushes L2 and takes longer than Python needs to enqueue the call.
        self.flush = torch.empty(2**32 if self.cuda else 1, dtype=torch.int8, device=device)

    def measure(
        self, call: Callable[[], Tensor | None], floor: Callable[[], None] | None, x: dict[str, Tensor]
    ) -> tuple[float, float, str, float, float]:
        times, ratios, hosts = [], [], []
        for i in range(self.repeats + 3):
            forget(x)
            least = self.once(floor)[1] if floor is not None else None
            _, milliseconds, host = self.once(call)
            if i >= 3:
                times.append(milliseconds)
                hosts.append(host)
                if least is not None:
                    ratios.append(milliseconds / least)
        forget(x)
        peak = 0.0
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.once(call)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        forget(x)
        ratio = f"{statistics.median(ratios):.3f}" if ratios else "-"
        return statistics.median(times), min(times), ratio, peak, statistics.median(hosts)

    def once(self, call: Callable[[], Tensor | None]) -> tuple[Tensor | None, float, float]:
        if not self.cuda:
            start = time.perf_counter()
            loss = run(call)
            passed = (time.perf_counter() - start) * 1e3
            return loss, passed, passed
        for _ in range(3):
            self.flush.zero_()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        start = time.perf_counter()
        loss = run(call)
        host = (time.perf_counter() - start) * 1e3
        last.record()
        torch.cuda.synchronize()
        return loss, first.elapsed_time(last), host


def run(call: Callable[[], Tensor | None]) -> Tensor | None:
    loss = call()
    if loss is not None:
        loss.backward()
    return loss


def forget(x: dict[str, Tensor]) -> None:
    x["student_hidden"].grad = x["student_head"].grad = None


def floor_call(x: dict[str, Tensor], teacher: bool, head_gradient: bool) -> Callable[[], None]:
    """Return a call of the products alone: random numbers stand for the gradients that a loss would give."""
    hidden, head = x["student_hidden"].detach(), x["student_head"].detach()
    logits = torch.empty(hidden.shape[0], head.shape[0], device=hidden.device, dtype=torch.bfloat16).normal_()
    out = torch.empty_like(logits)

    def call() -> None:
        torch.mm(hidden, head.T, out=out)
        if teacher:
            torch.mm(x["teacher_hidden"], x["teacher_head"].T, out=out)
        torch.mm(logits, head)
        if head_gradient:
            torch.mm(logits.T, hidden)

    return call


def teacher_top_k(x: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    parts = []
    for hidden in x["teacher_hidden"].split(1024):
        logits = (hidden @ x["teacher_head"].T).float() / TEMPERATURE
        parts.append(logits.log_softmax(-1).topk(k))
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def materialised(x: dict[str, Tensor]) -> Tensor:
    """Compute the loss as a trainer without a fused loss does: both models' whole logits, cast to float32."""
    labels, T = x["labels"], TEMPERATURE
    student = (x["student_hidden"] @ x["student_head"].T).float()
    with torch.no_grad():
        teacher = (x["teacher_hidden"] @ x["teacher_head"].T).float()
    counted = labels != IGNORE
    ce = functional.cross_entropy(student, labels, ignore_index=IGNORE, reduction="sum")
    log_p, log_q = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    kl = functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    total = (1 - ALPHA) * ce + ALPHA * T * T * torch.where(counted, kl, 0.0).sum()
    return total / counted.sum().clamp(min=1)


def compiled(function: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    fast = torch.compile(function, dynamic=False)
    return lambda: fast(x)


def compiled_chunks(x: dict[str, Tensor], rows: int) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    fast = torch.compile(chunk_loss_and_gradient, dynamic=False)
    return lambda: CompiledChunks.apply(
        x["student_hidden"], x["student_head"], x["teacher_hidden"], x["teacher_head"], x["labels"], rows, fast
    )


def chunk_loss_and_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor, ce_weight: Tensor, kl_weight: Tensor
) -> tuple[Tensor, Tensor]:
    student, teacher = student.float(), teacher.float()
    counted = labels != IGNORE
    target = torch.where(counted, labels, 0)[:, None]
    log_p1 = student.log_softmax(-1)
    log_p, log_q = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).log_softmax(-1)
    q = log_q.exp()
    losses = kl_weight * (q * (log_q - log_p)).sum(-1) - ce_weight * log_p1.gather(1, target)[:, 0]
    one_hot = torch.arange(student.shape[1], device=student.device) == target
    gradient = ce_weight * (log_p1.exp() - one_hot.float()) + kl_weight / TEMPERATURE * (log_p.exp() - q)
    return (losses * counted).sum(), (gradient * counted[:, None]).bfloat16()


class CompiledChunks(torch.autograd.Function):
    """The best that torch alone can do: gradients in forward, a compiled pass over each chunk, cuBLAS for the rest."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, labels, rows, fast):  # type: ignore[no-untyped-def]
        count = (labels != IGNORE).sum().clamp(min=1).float()
        weights = (1 - ALPHA) / count, ALPHA * TEMPERATURE**2 / count
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk = hidden[part]
            value, gradient = fast(chunk @ head.T, teacher_hidden[part] @ teacher_head.T, labels[part], *weights)
            loss += value
            torch.mm(gradient, head, out=d_hidden[part])
            torch.addmm(d_head, gradient.T, chunk, out_dtype=torch.float32, out=d_head)
        ctx.save_for_backward(d_hidden, d_head)
        return loss

    @staticmethod
    def backward(ctx, d_loss):  # type: ignore[no-untyped-def]
        d_hidden, d_head = ctx.saved_tensors
        return (d_hidden * d_loss).bfloat16(), (d_head * d_loss).bfloat16(), *[None] * 5


def liger(x: dict[str, Tensor], rows: int) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch._dynamo.reset()
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA,
        weight_soft_loss=ALPHA * TEMPERATURE**2,
        beta=0.0,
        ignore_index=IGNORE,
        temperature=TEMPERATURE,
        compiled=True,
        chunk_size=rows,
    )
    return lambda: loss(x["student_hidden"], x["student_head"], x["teacher_hidden"], x["teacher_head"], x["labels"])


def trl(x: dict[str, Tensor]) -> Callable[[], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    counted = x["labels"] != IGNORE

    def call() -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(
            x["student_hidden"][counted],
            x["student_head"],
            None,
            x["teacher_hidden"][counted],
            x["teacher_head"],
            None,
            0.0,
            TEMPERATURE,
        )
        return divergence.sum() / counted.sum()

    return call


if __name__ == "__main__":
    main()
