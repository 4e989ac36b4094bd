"""Compares the time of a distillation step with that of a fine-tuning step, with the true command, for each placement.

    python benchmarks/kd_step.py [--task classification|causal_lm] [--rounds 3] [--steps 30] [--student-layers 2]

The variants are SFT; KD with a replicated, an offloaded, a sharded (ZeRO-3, with the student under ZeRO-2) and a cached
teacher; and KD in a loop of transformers' Trainer (hf_trainer_kd.py). They run in turns. For each it prints the median
seconds per step over all rounds, without the first five steps of each run, the ratio to SFT, and the peak memory (of
the GPU, or of the process if there is none). The student has some of the teacher's own layers (for causal_lm it is a
smaller model from scratch), and both read the demo data.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = {"classification": "configs/quickstart/sft.yaml", "causal_lm": "configs/quickstart/causal_lm.yaml"}
HF = "KD, HF Trainer"  # whole logits of both models in a loop that is not forge's: what a user would write
VARIANTS = {
    "SFT": (),
    "KD, replicated": ("distillation.alpha=0.5", "teacher.placement=replicated"),
    "KD, offload": ("distillation.alpha=0.5", "teacher.placement=offload"),
    # With one process it measures the bookkeeping of two engines, not the traffic between GPUs.
    "KD, zero3": ("distillation.alpha=0.5", "teacher.placement=zero3", "deepspeed.student=zero2"),
    HF: ("distillation.alpha=0.5",),
    "KD, cached": ("distillation.alpha=0.5", "teacher.placement=cached"),
}
WARM_UP = 5  # steps at the start of each run that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=CONFIGS, default="classification")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--student-layers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run("teacher", args.task, root, 2)
        teacher = root / Path(CONFIGS[args.task]).relative_to("configs").with_suffix("") / "teacher"
        settings = student_settings(args.task, args.student_layers, teacher)
        taught = (f"teacher.path={teacher}",)
        cached = [part for setting in (*settings, *taught, *VARIANTS["KD, cached"]) for part in ("--set", setting)]
        forge("-m", "forge.cli", "cache-teacher", CONFIGS[args.task], "--output_root", str(root), *cached)
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        memory: dict[str, float] = dict.fromkeys(VARIANTS, 0.0)
        for round_number in range(args.rounds):
            for i in range(len(VARIANTS)):  # each round starts with another variant
                variant = list(VARIANTS)[(i + round_number) % len(VARIANTS)]
                run_name = f"{variant.replace(', ', '-')}-{round_number}"
                own = (*taught, *VARIANTS[variant]) if VARIANTS[variant] else ()
                if variant == HF:
                    found = run_hf(args.task, root, args.steps, *settings, *own)
                    seconds[variant] += found["seconds"][WARM_UP:]
                    memory[variant] = max(memory[variant], found["peak_memory_mib"])
                    continue
                folder = run(run_name, args.task, root, args.steps, *settings, *own)
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                steps = [line for line in lines if "rows_per_second" in line][WARM_UP:]
                rows = json.loads((folder / "run_metadata.json").read_text())["world"]["rows_per_step"]
                seconds[variant] += [rows / line["rows_per_second"] for line in steps]
                memory[variant] = max(memory[variant], *(line["peak_memory_mib"] for line in steps))
    print(f"{args.task}, {args.rounds} rounds of {args.steps} steps, {len(seconds['SFT'])} steps counted of each")
    print(f"{'':18} {'median s':>9} {'min s':>9} {'to SFT':>7} {'peak MiB':>9}")
    base = statistics.median(seconds["SFT"])
    for variant, found in seconds.items():
        median = statistics.median(found)
        print(f"{variant:18} {median:9.4f} {min(found):9.4f} {median / base:7.3f} {memory[variant]:9.0f}")


def student_settings(task: str, layers: int, teacher: Path) -> list[str]:
    """Return the settings of a student that is smaller than the teacher."""
    if task == "causal_lm":
        # Rows in any order, because the Trainer does not group them by length.
        return [f"model.config.num_hidden_layers={layers}", "training.length_grouping=false"]
    kept = [round(i * 6 / layers) for i in range(layers)]
    return [f"model.path={teacher}", f"model.keep_layers=[{', '.join(map(str, kept))}]"]


def run(name: str, task: str, root: Path, steps: int, *settings: str) -> Path:
    """Train for that many steps without evaluations and checkpoints; return the run directory."""
    quiet = ("evaluation.baseline=false", "evaluation.final=false", "checkpoint.every_steps=null")
    sets = [part for s in (*quiet, "logging.every_steps=1", *settings) for part in ("--set", s)]
    where = ("--output_root", str(root), "--run_name", name)
    forge("forge.py", "--config", CONFIGS[task], *where, "--max_steps", str(steps), *sets)
    return next(path.parent for path in root.rglob("metrics.jsonl") if path.parent.name == name)


def run_hf(task: str, root: Path, steps: int, *settings: str) -> dict[str, Any]:
    """Return the seconds of each step, and the peak memory, of the Trainer's loop."""
    out = root / "hf.json"
    forge("benchmarks/hf_trainer_kd.py", CONFIGS[task], json.dumps(settings), str(steps), str(out))
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def forge(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
