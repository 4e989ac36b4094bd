"""Damages the newest checkpoint in many ways: a run must detect each, and resume from the older checkpoint."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from faults.attempts import wait
from faults.crash import injector
from faults.scene import Scene, Shape, checkpoint_names, closed, drop, last_words, run_of
from faults.trials import Trial
from forge.checkpoint.selection import select
from forge.errors import TrainingError
from forge.run.directory import RunDirectory
from forge.run.state import TrainingState

PAGE = 4096
Damage = Callable[[Path, random.Random, "Donors"], str | None]  # what was done; None if it is impossible here


class Donors:
    """A run that was killed after two checkpoints, and the intact directories of another run of the same steps."""

    def __init__(self, scene: Scene, shape: Shape):
        self.scene, self.shape = scene, shape
        self.root, self.other = (_broken_off(scene, shape) for _ in range(2))

    def copy(self) -> Path:
        root = self.scene.new_root()
        # The run alone: its config names the first output root, whose registry the copies keep writing.
        shutil.copytree(run_of(self.root), run_of(root))
        return root


def _broken_off(scene: Scene, shape: Shape) -> Path:
    """Killed when step 5 was reported: it has checkpoint-2 and checkpoint-4, and the curve is ahead of them."""
    root = scene.new_root()
    aimed = injector(root, 0, only=r"^write .*metrics\.jsonl", at=4, when="after")
    ended = wait(scene.begin(shape, root, [aimed] + [[] for _ in range(shape.ranks - 1)]))
    assert ended.killed, ended.text
    assert checkpoint_names(run_of(root)) == ["checkpoint-2", "checkpoint-4"], ended.text
    return root


def truncate(run: Path, random_: random.Random, donors: Donors) -> str:
    file = _some_file(run, random_)
    size = random_.choice([0, 1, file.stat().st_size // 2, file.stat().st_size - 1, random_.randrange(_size(file))])
    os.truncate(file, min(size, _size(file) - 1))
    return f"{file.name} cut to {size} bytes"


def flip_bit(run: Path, random_: random.Random, donors: Donors) -> str:
    file = _some_file(run, random_)
    return _flip(file, random_.randrange(_size(file)), 1 << random_.randrange(8))


def flip_byte(run: Path, random_: random.Random, donors: Donors) -> str:
    file = _some_file(run, random_)
    return _flip(file, random_.randrange(_size(file)), 0xFF)


def zero_page(run: Path, random_: random.Random, donors: Donors) -> str | None:
    file = _some_file(run, random_)
    data = bytearray(file.read_bytes())
    start = random_.randrange(-(-len(data) // PAGE)) * PAGE
    page = data[start : start + PAGE]
    if not any(page):
        return None
    data[start : start + PAGE] = bytes(len(page))
    file.write_bytes(data)
    return f"{file.name}: zeros at {start}"


def remove_file(run: Path, random_: random.Random, donors: Donors) -> str:
    file = _some_file(run, random_)
    file.unlink()
    return f"{file.name} removed"


def swap_files(run: Path, random_: random.Random, donors: Donors) -> str | None:
    """Swap two files of the checkpoint, such as the random numbers of two ranks."""
    files = _files(run)
    shards = [file for file in files if file.name.startswith("rng-")]
    first, second = random_.sample(shards if len(shards) > 1 and random_.random() < 0.5 else files, 2)
    if first.read_bytes() == second.read_bytes():
        return None
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    return f"{first.name} and {second.name} swapped"


def file_of_older(run: Path, random_: random.Random, donors: Donors) -> str | None:
    """Put a stale file under a valid name: the same size and format, but another step."""
    file = _some_file(run, random_)
    old = run / "checkpoint-2" / file.name
    if old.read_bytes() == file.read_bytes():
        return None
    shutil.copyfile(old, file)
    return f"{file.name} of checkpoint-2"


def manifest_of_another_run(run: Path, random_: random.Random, donors: Donors) -> str:
    shutil.copyfile(run_of(donors.other) / "checkpoint-4" / "manifest.json", run / "checkpoint-4" / "manifest.json")
    return "manifest of another run"


def checkpoint_of_another_run(run: Path, random_: random.Random, donors: Donors) -> str:
    shutil.rmtree(run / "checkpoint-4")
    shutil.copytree(run_of(donors.other) / "checkpoint-4", run / "checkpoint-4")
    return "checkpoint of another run"


def checkpoint_of_another_step(run: Path, random_: random.Random, donors: Donors) -> str:
    shutil.rmtree(run / "checkpoint-4")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-4")
    return "checkpoint-2 under the name of checkpoint-4"


def empty_manifest(run: Path, random_: random.Random, donors: Donors) -> str:
    text = random_.choice(["", "{}", "null", "[]", "\n", '{"format": 1}'])
    (run / "checkpoint-4" / "manifest.json").write_text(text)
    return f"manifest is {text!r}"


def edited_manifest(run: Path, random_: random.Random, donors: Donors) -> str:
    file = run / "checkpoint-4" / "manifest.json"
    values = json.loads(file.read_text())
    key = random_.choice(["step", "samples", "tokens", "ranks", "rows_per_step", "epoch", "attempt"])
    values[key] += random_.choice([-1, 1, 2])
    file.write_text(json.dumps(values, indent=2))
    return f"manifest says {key} {values[key]}"


def edited_hash(run: Path, random_: random.Random, donors: Donors) -> str:
    """Change a file together with its entry in the manifest, as a careless tool would."""
    import hashlib

    file = run / "checkpoint-4" / "manifest.json"
    values = json.loads(file.read_text())
    name = random_.choice(sorted(values["files"]))
    changed = run / "checkpoint-4" / name
    _flip(changed, random_.randrange(_size(changed)), 1)
    values["files"][name]["sha256"] = hashlib.sha256(changed.read_bytes()).hexdigest()
    file.write_text(json.dumps(values, indent=2))
    return f"{name} changed with its hash"


def extra_byte(run: Path, random_: random.Random, donors: Donors) -> str:
    file = _some_file(run, random_)
    with open(file, "ab") as opened:
        opened.write(bytes([random_.randrange(256)]) if file.name != "manifest.json" else b"x")
    return f"{file.name} has a byte more"


def empty_folder(run: Path, random_: random.Random, donors: Donors) -> str:
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-4").mkdir()
    return "empty folder"


def not_a_folder(run: Path, random_: random.Random, donors: Donors) -> str:
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-4").write_text("checkpoint")
    return "a file in place of the folder"


def folder_for_file(run: Path, random_: random.Random, donors: Donors) -> str:
    file = _some_file(run, random_)
    file.unlink()
    file.mkdir()
    return f"{file.name} is a folder"


def dangling_link(run: Path, random_: random.Random, donors: Donors) -> str:
    file = _some_file(run, random_)
    file.unlink()
    file.symlink_to("nowhere")
    return f"{file.name} is a broken link"


def newer_empty_folder(run: Path, random_: random.Random, donors: Donors) -> str:
    (run / "checkpoint-5").mkdir()
    flipped = flip_byte(run, random_, donors)
    return f"an empty checkpoint-5, and {flipped}"


DAMAGES: tuple[Damage, ...] = (
    *(truncate, flip_bit, flip_byte, zero_page, remove_file, swap_files, file_of_older, manifest_of_another_run),
    *(checkpoint_of_another_run, checkpoint_of_another_step, empty_manifest, edited_manifest, edited_hash, extra_byte),
    *(empty_folder, not_a_folder, folder_for_file, dangling_link, newer_empty_folder),
)
POINTERS = ("", "\n", "checkpoint-2\n", "checkpoint-99\n", "../../etc/passwd\n", "checkpoint-4", "\0\xff", None)


def corruption_trials(scene: Scene, shape: Shape, count: int, *, resume_every: int, seed: int = 0) -> list[Trial]:
    """Return trials of seeded damages, each kind equally often; every resume_every-th run is resumed to its end."""
    donors = Donors(scene, shape)
    trials = []
    for i in range(count):
        damage = DAMAGES[i % len(DAMAGES)]
        trials.append(_fall_back(donors, damage, seed * 100_000 + i, really=i % resume_every == resume_every // 2))
    return trials


def pointer_trials(scene: Scene, shape: Shape) -> list[Trial]:
    """An empty, wrong or missing latest_checkpoint, and an outdated training_state.json, change nothing."""
    donors = Donors(scene, shape)
    return [_pointer(donors, text, named) for text in POINTERS for named in ("checkpoint-4", "checkpoint-2", None)]


def none_left_trials(scene: Scene, shape: Shape, count: int) -> list[Trial]:
    """If all checkpoints are bad, the run does not start afresh, neither at the first try nor at the second."""
    donors = Donors(scene, shape)
    return [_none_left(donors, seed) for seed in range(count)]


def _fall_back(donors: Donors, damage: Damage, seed: int, *, really: bool) -> Trial:
    def run() -> str | None:
        random_ = random.Random(seed)
        root, done = donors.copy(), None
        folder = run_of(root)
        whole = _meaning(folder / "checkpoint-4")
        while done is None or _meaning(folder / "checkpoint-4") == whole:
            done = damage(folder, random_, donors)
        if really:
            problem, ended = donors.scene.finish(donors.shape, root)
            if problem is None and "checkpoint-4 was renamed to .bad-" not in ended.text:
                problem = "the log says nothing of it"
        else:
            problem = _selected(folder, "checkpoint-2") or _selected(folder, "checkpoint-2")
        reason = folder / ".bad-checkpoint-4"
        if problem is None and not reason.exists():
            problem = "checkpoint-4 was not set aside"
        if problem is None and reason.is_dir() and not json.loads((reason / "quarantine.json").read_text())["reason"]:
            problem = "no reason is given"
        if problem is None:
            drop(root)
        return problem and f"{done}: {problem} [{root}]"

    return Trial(f"{damage.__name__} seed {seed}" + ", resumed" * really, run)


def _pointer(donors: Donors, text: str | None, named: str | None) -> Trial:
    def run() -> str | None:
        root = donors.copy()
        folder = run_of(root)
        if text is None:
            (folder / "latest_checkpoint").unlink()
        else:
            (folder / "latest_checkpoint").write_text(text)
        state = json.loads((folder / "training_state.json").read_text())
        (folder / "training_state.json").write_text(json.dumps(state | {"latest_checkpoint": named}))
        problem, ended = donors.scene.finish(donors.shape, root)
        if problem is None and "from checkpoint-4" not in ended.text:
            problem = "it did not resume from checkpoint-4"
        return closed(problem, root)

    return Trial(f"latest_checkpoint {text!r}, the state names {named}", run)


def _none_left(donors: Donors, seed: int) -> Trial:
    def run() -> str | None:
        random_ = random.Random(seed)
        root = donors.copy()
        folder = run_of(root)
        if seed % 4 == 3:
            for name in checkpoint_names(folder):
                shutil.rmtree(folder / name)
        for name in checkpoint_names(folder):
            file = random_.choice(sorted((folder / name).iterdir()))
            _flip(file, random_.randrange(_size(file)), 0xFF)
        for attempt in ("first", "second", "third"):
            ended = wait(donors.scene.start_again(donors.shape, root))
            if set(ended.codes) != {1}:
                return f"the {attempt} try ended with {ended.codes}: {last_words(ended.text)} [{root}]"
            if "no usable checkpoint" not in ended.text or "Traceback" in ended.text:
                return f"the {attempt} try said {last_words(ended.text)} [{root}]"
            if checkpoint_names(folder) or (folder / "final").exists():
                return f"the {attempt} try trained [{root}]"
        drop(root)
        return None

    return Trial(f"seed {seed}", run)


def _selected(run: Path, expected: str) -> str | None:
    """Return what forge's selection chooses, if that is not the expected checkpoint."""
    try:
        chosen = select(RunDirectory(run), TrainingState.load(run / "training_state.json"))
    except TrainingError as error:
        return f"no checkpoint was chosen: {error}"
    name = chosen[0].name if chosen is not None else None
    return None if name == expected else f"{name} was chosen"


def _meaning(folder: Path) -> dict[str, Any]:
    """Return every file's bytes, and the manifest's values: another blank at its end is not damage."""
    meaning: dict[str, Any] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        meaning[file.name] = file.read_bytes() if file.is_file() else None
    with suppress(ValueError, KeyError, TypeError):
        meaning["manifest.json"] = json.loads(meaning["manifest.json"])
    return meaning


def _files(run: Path) -> list[Path]:
    return sorted((run / "checkpoint-4").iterdir())


def _some_file(run: Path, random_: random.Random) -> Path:
    return random_.choice(_files(run))


def _size(file: Path) -> int:
    return file.stat().st_size


def _flip(file: Path, place: int, mask: int) -> str:
    data = bytearray(file.read_bytes())
    data[place] ^= mask
    file.write_bytes(data)
    return f"{file.name}: byte {place} xor {mask:#x}"
