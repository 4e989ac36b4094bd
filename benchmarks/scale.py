"""Measures what forge's own bookkeeping costs on many ranks, with fake shards and fake ranks on one machine.

    python benchmarks/scale.py [--ranks 1024] [--gloo 8 16 32] [--folder DIR] [--only checkpoint …]

Prints one table per part: the files of a checkpoint, the communication between ranks, the registry of runs, a run's
metadata, and the rows of a step. Shards are small: the seconds are those of names, hashes and file system calls, not of
bytes. Communication is timed on true gloo ranks, all on this machine's cores. For --ranks it is extrapolated along the
straight line through the two largest numbers of ranks.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from forge.checkpoint.commit import _discard
from forge.checkpoint.contents import PickledFile, _rng_state
from forge.checkpoint.manifest import (
    FORMAT,
    MODEL_FILES,
    OPTIMIZER_FILE,
    STATE_FILE,
    Manifest,
    StoredFile,
    check_files,
    rng_file,
    store,
    verify,
)
from forge.cluster.launch import free_port
from forge.cluster.signals import StopRequest
from forge.data.batches import Share, epoch_steps, evaluation_batches, split_step
from forge.ranks.agreement import gather_values, on_rank_0
from forge.ranks.stop_vote import StopVote
from forge.run.directory import RunDirectory, find_runs
from forge.run.files import open_to_others, sha256_of, sync_folder, write_json
from forge.run.provenance import code_facts, provenance
from forge.run.registry import incomplete_runs, register
from forge.run.state import Stage, TrainingState, now

RUNS = 1000
ROWS, ROWS_PER_RANK = 1_000_000, 8
SHARD_BYTES = 1 << 10
REPEATS = 10
HASHED_BYTES = 1 << 28
STATE_BYTES = 12  # per parameter under ZeRO: master weight and AdamW's two moments, in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--gloo", type=int, nargs="+", default=[8, 16, 32], help="numbers of true ranks, two or more")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)  # before any rank is forked
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for part in args.only:
            rows = PARTS[part](args, Path(name))
            width = max(len(row[0]) for row in rows)
            print(f"\n{part}")
            for what, value in rows:
                print(f"  {what:{width}}  {value}", flush=True)


Rows = list[tuple[str, str]]


def the_files(args: argparse.Namespace, folder: Path) -> Rows:
    """Time the writing, listing, verification, renaming and deletion of a checkpoint of that many ranks."""
    run = RunDirectory(folder / "run")
    run.path.mkdir()
    staging = run.path / ".tmp-1-1-0"
    staging.mkdir()
    shard, rng = os.urandom(SHARD_BYTES), _rng_state()
    files: dict[str, StoredFile] = {}

    def write() -> None:
        for rank in range(args.ranks):
            for name in (f"model-{rank:05d}.safetensors", f"optimizer-{rank:05d}.safetensors"):
                files[name] = store(staging / name, lambda file: file.write(shard))
            files[rng_file(rank)] = store(staging / rng_file(rank), PickledFile(rng).write)
        # Files that exist once: the model's config, the state of the run, and the names that a whole model would have.
        for name in (*MODEL_FILES, OPTIMIZER_FILE, STATE_FILE):
            files[name] = store(staging / name, lambda file: file.write(shard))

    written_s = seconds(write)
    manifest = Manifest(
        format=FORMAT, run_id="a-run", attempt=1, step=1, epoch=0.5, samples=8 * args.ranks, tokens=10**6,
        ranks=args.ranks, rows_per_step=8 * args.ranks, mixed_precision="bf16",
        config={"training": {"seed": 42}}, config_hash="0" * 64, data_fingerprint="0" * 64, base=None,
        created_at=now(), files=files, **code_facts(),
    )  # fmt: skip
    target = run.checkpoint(1)
    rows = [
        (f"files written and synced, one after the other: {len(files)}", f"{written_s:.2f} s"),
        ("modes set (open_to_others)", took(lambda: open_to_others(staging))),
        ("manifest written", took(lambda: manifest.write(staging))),
        ("manifest.json", size((staging / "manifest.json").stat().st_size)),
        ("manifest read, its own hash checked", took(lambda: Manifest.read(staging))),
        ("sizes of all files checked", took(lambda: check_files(staging, manifest, hashes=False))),
        ("folder synced", took(lambda: sync_folder(staging))),
        ("renamed", f"{1000 * seconds(lambda: os.rename(staging, target)):.1f} ms"),
        ("verified, sizes only (each commit, for every kept one)", took(lambda: verify(target, "a-run", hashes=False))),
        ("verified with hashes (a resume)", took(lambda: verify(target, "a-run"))),
        ("deleted", f"{1000 * seconds(lambda: _discard(target)):.1f} ms"),
        ("manifest as rank 0 sends it to the others at a resume (pickle)", size(len(pickle.dumps(manifest)))),
    ]
    big = folder / "big"
    with open(big, "wb") as file:
        file.write(os.urandom(HASHED_BYTES))
    rate = HASHED_BYTES / statistics.median(seconds(lambda: sha256_of(big)) for _ in range(3))
    big.unlink()
    rows.append(("bytes hashed a second, by the one rank that verifies at a resume", f"{rate / 1e9:.2f} GB/s"))
    for billions in (1, 7, 70):
        rows.append(
            (f"  so {billions}e9 parameters of {STATE_BYTES} bytes", f"{billions * 1e9 * STATE_BYTES / rate:.0f} s")
        )
    return rows


def the_talk(args: argparse.Namespace, folder: Path) -> Rows:
    """Time the communication of gloo ranks, in addition to a training group that transfers nothing."""
    names = (rng_file(1023), "model-01023.safetensors", "optimizer-01023.safetensors")
    outcome = ({name: StoredFile(bytes=10**9, sha256=f"{number:064}") for number, name in enumerate(names)}, None)
    large = b"0" * 300_000  # about a manifest of 1,024 ranks
    counts, found = sorted(args.gloo), {}
    for ranks in counts:
        found[ranks] = _on_gloo(ranks, outcome, large)
    rows = [("ranks", "".join(f"{ranks:>11}" for ranks in counts) + f"{args.ranks:>11}, extrapolated")]
    for what in found[counts[0]]:
        values = [found[ranks][what] for ranks in counts]
        (a, b), (x, y) = counts[-2:], values[-2:]
        there = y + (y - x) / (b - a) * (args.ranks - b)
        known = f"{there:11.4g}" if there > y else f"{'noise':>11}"
        rows.append((what, "".join(f"{value:11.4g}" for value in values) + known))
    pickled = len(pickle.dumps(outcome))
    rows += [
        ("the outcome of one rank's save (pickle)", size(pickled)),
        (f"  gathered by every one of {args.ranks} ranks: to each", size(args.ranks * pickled)),
        ("  and over all", size(args.ranks**2 * pickled)),
        (f"a value of {size(len(large))} from rank 0, sent to each of them: over all", size(args.ranks * len(large))),
        ("  the same gathered from all, padded to the largest: over all", size(args.ranks**2 * len(large))),
    ]
    return rows


def _on_gloo(ranks: int, outcome: Any, large: bytes) -> dict[str, float]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, outcome, large, theirs)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    theirs.close()
    found: dict[str, float] = ours.recv()
    for process in processes:
        process.join()
    return found


def _rank(rank: int, ranks: int, port: int, outcome: Any, large: bytes, answers: Any) -> None:
    warnings.simplefilter("ignore")
    # Stands for NCCL: it joins the ranks but transfers nothing.
    import torch.testing._internal.distributed.fake_pg

    distributed = torch.distributed
    minutes = timedelta(minutes=5)
    store = distributed.TCPStore("127.0.0.1", port, ranks, rank == 0, minutes, wait_for_workers=False)
    distributed.init_process_group("fake", store=store, rank=rank, world_size=ranks)
    open_before = len(os.listdir("/proc/self/fd"))
    accelerator: Any = SimpleNamespace(is_main_process=rank == 0, num_processes=ranks)
    found: dict[str, float] = {"group built (s)": seconds(lambda: gather_values(None))}
    found["files open for it on each rank"] = len(os.listdir("/proc/self/fd")) - open_before
    vote = StopVote(accelerator, StopRequest())
    work: list[tuple[str, Callable[[], Any]]] = [
        ("one value gathered (ms)", lambda: gather_values(None)),
        ("outcomes of a save gathered (ms)", lambda: gather_values(outcome)),
        ("300 kB from rank 0 to all (ms)", lambda: on_rank_0(accelerator, lambda: large)),
        ("  the same, gathered (ms)", lambda: gather_values(large if rank == 0 else None)),
        ("a vote to stop, at every step (ms)", vote.cast),
    ]
    for what, call in work:
        call()
        gather_values(None)
        found[what] = 1000 * seconds(lambda: [*(call() for _ in range(REPEATS)), gather_values(None)]) / REPEATS  # noqa: B023
    # Each measurement ends with a gather, which waits for all ranks.
    waits = found["one value gathered (ms)"] / (REPEATS + 1)
    for what, _ in work:
        found[what] -= waits
    if rank == ranks - 1:  # not rank 0: all are also connected to its store, which a launcher has otherwise
        answers.send(found)
    gather_values(None)
    os._exit(0)


def the_registry(args: argparse.Namespace, folder: Path) -> Rows:
    """Time the registry of a thousand unfinished runs."""
    root = folder / "outputs"
    for number in range(RUNS):
        run = RunDirectory(root / f"config_{number % 20}" / f"run-{number}")
        run.path.mkdir(parents=True)
        state = TrainingState(run_id=f"id-{number:05d}", stage=Stage.TRAINING, created_at=now())
        state.save(run.state_file)
        register(root, run, state.run_id, state.stage)
    entry = next((root / ".incomplete").iterdir())
    one = RunDirectory(root / "config_0" / "one-more")
    one.path.mkdir()
    return [
        (f"listed: {RUNS} incomplete runs", took(lambda: incomplete_runs(root))),
        ("found in their folders", took(lambda: find_runs(root))),
        ("one registered (a start)", took(lambda: register(root, one, "one-more", Stage.SETUP))),
        ("an entry", size(entry.stat().st_size)),
    ]


def the_metadata(args: argparse.Namespace, folder: Path) -> Rows:
    """Time and measure run_metadata.json after many attempts; it contains no list by rank."""
    os.environ["SLURM_JOB_NODELIST"] = "node[0001-0128]"
    attempt = provenance(None, ["forge/train.py", "--config=X.yaml"]) | {"ranks": args.ranks, "attempt": 1}
    file = folder / "run_metadata.json"
    rows: Rows = [("one attempt", size(len(json.dumps(attempt, indent=2))))]
    for attempts in (1, 100):
        values = {"attempts": [attempt] * attempts}
        rows.append((f"written with {attempts} attempts", took(lambda: write_json(file, values))))  # noqa: B023
        rows.append((f"  run_metadata.json of {attempts}", size(file.stat().st_size)))
    state = TrainingState(run_id="a-run", created_at=now())
    rows.append(("training_state.json", size(len(json.dumps(asdict(state))))))
    return rows


def the_rows(args: argparse.Namespace, folder: Path) -> Rows:
    """Time what each rank computes about the order of the rows, for every step and every epoch."""
    lengths = np.random.default_rng(0).integers(16, 2048, ROWS)
    rows_per_step = args.ranks * ROWS_PER_RANK
    step, everything = np.arange(rows_per_step), np.arange(ROWS)

    def epoch() -> Any:
        return epoch_steps(lengths, rows_per_step, 42, 0, group_by_length=True)

    rows: Rows = [(f"an epoch of {ROWS:,} rows in steps of {rows_per_step:,}", took(epoch))]
    for micro_batches in (1, 8):
        rank = args.ranks - 1
        part = took(lambda: split_step(step, Share(rank, args.ranks, micro_batches)))  # noqa: B023
        rows.append((f"a step's rows of one rank, {micro_batches} micro-batches", part))
    evaluation = took(lambda: evaluation_batches(lengths, everything, 32, args.ranks))
    return [*rows, (f"an evaluation of {ROWS:,} rows spread", evaluation)]


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def took(work: Callable[[], Any]) -> str:
    """Return the median time of several calls, as text."""
    median_s = statistics.median(seconds(work) for _ in range(REPEATS))
    return f"{1e3 * median_s:.2f} ms" if median_s > 1e-4 else f"{1e6 * median_s:.1f} us"


def size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


PARTS: dict[str, Callable[[argparse.Namespace, Path], Rows]] = {
    "checkpoint": the_files,
    "talk": the_talk,
    "registry": the_registry,
    "metadata": the_metadata,
    "rows": the_rows,
}


if __name__ == "__main__":
    main()
