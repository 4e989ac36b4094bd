"""Prints the errors of the distillation loss's gradients against float64, computed from the hidden states.

    python benchmarks/kd_loss_error.py                   on a CUDA device: every precision of the fused path
    python benchmarks/kd_loss_error.py --device cpu      the plain path, on smaller shapes

The student is its teacher plus noise: logits of standard deviation `std` that differ by `gap` rms. If a loss rounds the
logits of both models, its value hardly changes, but its gradient is lost as the gap closes. The exact loss is a
separate program (exact_loss.py). A gradient with an error of more than 0.5 %, in any precision but bf16, is marked and
makes the exit code 1.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from exact_loss import exact_loss, relative_error
from torch import Tensor

from forge.losses.kd_arguments import Computing, Formula, HeadInput
from forge.losses.linear_kd import linear_kd

DIVERGENCES = {"forward_kl": 0.0, "reverse_kl": 0.0, "jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1, "tvd": 0.0}
LIMIT = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--shape", default=None, help="N,V,H; 256,32000,1024 on a GPU and 64,2000,128 on a CPU")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    default = "64,2000,128" if arguments.device == "cpu" else "256,32000,1024"
    N, V, H = map(int, (arguments.shape or default).split(","))
    precisions = [None] if arguments.device == "cpu" else ["difference", "fp32", "bf16"]
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    print(f"torch {torch.__version__}, {where}; N={N} V={V} H={H} T={arguments.temperature}, bfloat16 inputs")
    print(f"{'divergence':<15} {'std':>4} {'gap':>5} {'precision':<11} {'D':>8} {'dX':>9} {'dW':>9}   relative errors")
    wrong = []
    for divergence, share in DIVERGENCES.items():
        for std, gap in ((3.0, 1.0), (3.0, 3.0), (10.0, 0.1), (10.0, 0.01)):
            for precision in precisions:
                worst = [0.0, 0.0, 0.0]
                for seed in range(arguments.seeds):
                    tensors = near_pair(N, V, H, std, gap, seed, arguments.device)
                    errors = relative_errors(tensors, arguments.temperature, divergence, share, precision)
                    worst = [max(pair) for pair in zip(worst, errors, strict=True)]
                value, d_hidden, d_head = worst
                what = f"{divergence:<15} {std:>4.0f} {gap:>5} {precision or 'plain':<11}"
                right = precision == "bf16" or max(d_hidden, d_head) < LIMIT
                wrong += [] if right else [" ".join(what.split())]
                mark = "" if right else "  WRONG"
                print(f"{what} {value:>8.1e} {d_hidden:>9.3%} {d_head:>9.3%}{mark}", flush=True)
    if wrong:
        sys.exit(f"further than {LIMIT:.1%} from float64: {'; '.join(wrong)}")


def near_pair(N: int, V: int, H: int, std: float, gap: float, seed: int, device: str) -> dict[str, Tensor]:
    """Return bfloat16 tensors of a teacher, and of a student whose logits differ from the teacher's by gap."""
    torch.manual_seed(seed)
    hidden = torch.randn(N, H, device=device)
    head = torch.randn(V, H, device=device) * (std / H**0.5)
    noise = torch.randn(V, H, device=device) * (gap / H**0.5)
    teacher_head = head.bfloat16()
    return {
        "student_hidden": hidden.bfloat16(),
        "student_head": (teacher_head.float() + noise).bfloat16(),
        "labels": torch.randint(0, V, (N,), device=device),
        "teacher_hidden": hidden.bfloat16(),
        "teacher_head": teacher_head,
    }


def relative_errors(
    tensors: dict[str, Tensor], temperature: float, divergence: str, share: float, precision: str | None
) -> list[float]:
    """Return the errors of D, of the gradient in the hidden states, and of that in the head."""
    _, divergence_sum, *exact = exact_loss(tensors, 1.0, temperature, divergence, share)
    hidden = tensors["student_hidden"].detach().requires_grad_()
    head = tensors["student_head"].detach().requires_grad_()
    kd = linear_kd(
        HeadInput(hidden, head),
        HeadInput(tensors["teacher_hidden"], tensors["teacher_head"]),
        tensors["labels"],
        Formula(1.0, temperature, divergence, beta=share, skew=share),
        Computing(precision),
    )
    kd.loss_mean.backward()
    found = [relative_error(x.grad, true) for x, true in zip((hidden, head), exact, strict=True)]
    return [abs(kd.divergence_sum.item() - divergence_sum) / divergence_sum, *found]


if __name__ == "__main__":
    main()
