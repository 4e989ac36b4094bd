"""Measures how long training waits for a save, synchronous and asynchronous, compared with torch.save.

    python benchmarks/checkpoint_save.py [--hidden 1024 --layers 24] [--folder DIR] [--repeats 5]

Prints one row per method: the median of the seconds that training waited, the seconds until the commit, and the ratio
of the waiting time to that of torch.save for the same states. The model is a BERT encoder in float32 with AdamW, so a
checkpoint takes 12 bytes per parameter.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification

from forge.checkpoint.commit import Checkpoints, RunFacts
from forge.checkpoint.contents import Training
from forge.config.schema import CheckpointConfig
from forge.model.weights import trained_weights
from forge.run.directory import RunDirectory
from forge.run.lock import RunLock
from forge.run.state import TrainingState
from forge.student.student import Student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision="no")
    heads = max(1, args.hidden // 64)
    shape = {"hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": heads}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=4 * args.hidden))
    student = Student(model.to(accelerator.device))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    student, optimizer = accelerator.prepare(student, optimizer)
    for parameter in student.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    parameters = sum(parameter.numel() for parameter in student.parameters())
    print(f"{parameters / 1e6:.1f} M parameters on {accelerator.device}, torch {torch.__version__}")

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows = {"torch.save, no fsync": _times(args.repeats, lambda i: _torch_save(student, optimizer, folder))}
        for asynchronous in (False, True):
            way = "forge, asynchronous" if asynchronous else "forge"
            place = folder / way.replace(" ", "")
            rows[way] = _forge(place, accelerator, student, optimizer, asynchronous, args.repeats)
    baseline = statistics.median(stall for stall, _ in rows["torch.save, no fsync"])
    print(f"{'':24}{'waits s':>10}{'commits s':>12}{'x torch.save':>14}")
    for way, times in rows.items():
        stall, seconds = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{way:24}{stall:10.3f}{seconds:12.3f}{stall / baseline:14.2f}")


def _times(repeats: int, save) -> list[tuple[float, float]]:
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        save(i)
        times.append((time.perf_counter() - start,) * 2)
    return times


def _torch_save(student, optimizer, folder: Path) -> None:
    torch.save({"model": student.state_dict(), "optimizer": optimizer.state_dict()}, folder / "plain.pt")


def _forge(
    folder: Path, accelerator, student, optimizer, asynchronous: bool, repeats: int
) -> list[tuple[float, float]]:
    folder.mkdir()
    run = RunDirectory(folder)
    lock = RunLock(run)
    lock.take()
    state = TrainingState(run_id="benchmark")
    times = []
    checkpoints = Checkpoints(
        run,
        lock,
        Training(accelerator, trained_weights(accelerator.unwrap_model(student).model, None), optimizer, seed=0),
        CheckpointConfig(asynchronous=asynchronous, keep_last=1),
        RunFacts(1, 1, "no", {}, "", None, {}),
        lambda _, saved: times.append((saved.stall_seconds, saved.seconds)),
    )
    for step in range(1, repeats + 1):
        state.step = step
        checkpoints.save(state, {})
        while asynchronous and not checkpoints.written:
            time.sleep(0.01)  # stands for training, which has the device to itself
        checkpoints.finish(state)
    lock.release()
    return times


if __name__ == "__main__":
    main()
