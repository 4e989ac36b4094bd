"""Loads the rows of a data set, by split: from the hub, from a local folder, or generated."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from huggingface_hub import is_offline_mode

from forge.config.task_schema import DatasetConfig
from forge.data.demo.chat import demo_chat
from forge.data.demo.lines import demo_lines
from forge.data.demo.nli import demo_nli
from forge.data.files import READERS, read_file, stream_file
from forge.errors import ForgeError, TrainingError, UsageError

logger = logging.getLogger(__name__)

METADATA = "metadata"  # the file in an image folder with a row for each image, which it names by file_name
IN_LINES = "write one JSON object in each line of a .jsonl file"
OTHER_FORMATS = {  # by the end of a file's name: what to do with data that forge does not read
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip"), "unpack it"),
    ".json": f"{IN_LINES} (jq -c '.[]' does that with an array)",
    ".tsv": "write it with commas as a .csv file",
    ".txt": f'{IN_LINES}, such as {{"text": …}}',
    ".arrow": f"{IN_LINES} (datasets.load_from_disk(…)[split].to_json does that)",
}
Generate = Callable[[str, int], list[Any]]  # (split, how many rows) -> rows
DEMOS: dict[str, tuple[Generate, dict[str, int]]] = {  # with the number of rows of each split
    "nli": (demo_nli, {"train": 6000, "validation": 1000}),
    "lines": (demo_lines, {"train": 20000, "validation": 500}),
    "chat": (demo_chat, {"train": 8000, "validation": 500}),
}


@dataclass(frozen=True)
class StreamedRows:
    """Rows that are read one after another, from the first one in each pass."""

    rows: IterableDataset
    source: str  # the file, or the hub's data set and its split

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows. Raises UsageError for unreadable data, and TrainingError for errors that may be temporary."""
        count = 0
        try:
            for row in self.rows:
                count += 1
                yield row
        except ForgeError:  # a signal, which may come at any moment
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            place = f"reading {self.source} failed after {count} rows ({reason})"
            if isinstance(error, ValueError | TypeError | KeyError):  # raised by parsers: the content is wrong
                raise UsageError(f"{place}; check that it is complete and that text is UTF-8") from error
            raise TrainingError(f"{place}; resume once it can be read again") from error

    def select_columns(self, names: list[str]) -> "StreamedRows":
        """Return the rows with only these columns."""
        return StreamedRows(self.rows.select_columns(names), self.source)

    def first(self, count: int | None) -> "StreamedRows":
        """Return the first `count` rows; None: all."""
        return self if count is None else StreamedRows(self.rows.take(count), self.source)


def load_rows(config: DatasetConfig) -> tuple[Dataset, dict[str, Dataset]]:
    """Return the training split, and the evaluated splits by their short names (validation_matched -> matched).

    Raises UsageError for a data set that cannot be found or read, and for a missing or empty split.
    """
    if config.demo is not None:
        splits = {split: _generate(config, split) for split in DEMOS[config.demo][1]}
    elif config.path is not None:
        splits = _load_folder(Path(config.path), config)
    else:
        splits = _load_hub(config)

    where = describe(config)
    wanted = _evaluated(config, list(splits))
    for name in [config.train_split, *wanted]:
        if len(splits[name]) == 0:
            raise UsageError(f"{where}: the split {name} is empty; forge needs at least one row in each")
    if config.max_rows is not None:
        splits = {name: _spread(rows, config.max_rows) for name, rows in splits.items()}
    return splits[config.train_split], {_short(name): splits[name] for name in wanted}


def load_stream(config: DatasetConfig, max_evaluated: int | None) -> tuple[StreamedRows, dict[str, Dataset], str]:
    """Return the training split as a stream, the evaluated splits by their short names, and the data's identity.

    The identity stands in for a hash of the training rows, which nobody has read yet. Of a hub's evaluated splits the
    first max_evaluated rows are loaded. task.dataset.max_rows takes rows of the evaluated splits at equal
    distances, and the first rows of the training split. Raises UsageError like load_rows.
    """
    if config.path is not None:
        files = _find_files(Path(config.path), config)
        wanted = _evaluated(config, list(files))
        file = files[config.train_split]
        train = StreamedRows(stream_file(file), str(file))
        identity = f"{file.name} of {file.stat().st_size} bytes"  # in the fingerprint of runs: never to be reworded
        splits = {name: read_file(files[name]) for name in wanted}
    else:
        assert max_evaluated is not None  # the config requires it
        streams = _load_hub(config, streaming=True)
        wanted = _evaluated(config, list(streams))
        where = describe(config)
        read = {name: StreamedRows(rows, f"{where}, {name}") for name, rows in streams.items()}
        train = read[config.train_split]
        identity = f"{where} {config.revision} {config.train_split}"
        splits = {name: Dataset.from_list(list(read[name].first(max_evaluated))) for name in wanted}
    for name, rows in splits.items():
        if len(rows) == 0:
            raise UsageError(f"{describe(config)}: the split {name} is empty; forge needs at least one row in each")
    if config.max_rows is not None:
        splits = {name: _spread(rows, config.max_rows) for name, rows in splits.items()}
        identity += f", its first {config.max_rows} rows"
    return train.first(config.max_rows), {_short(name): rows for name, rows in splits.items()}, identity


def describe(config: DatasetConfig) -> str:
    """Return the data set's name, for messages and the model card; also in a stream's identity."""
    if config.demo is not None:
        return f"forge's demo data set {config.demo}"
    if config.path is not None:
        return config.path
    return " ".join(part for part in (config.name, config.config) if part)


def row_numbers(rows: Dataset) -> Sequence[int]:
    """Return each row's number in the user's data, of which max_rows may have selected a part."""
    chosen = rows._indices  # where a Dataset keeps its selection
    return range(len(rows)) if chosen is None else chosen.column(0).to_pylist()


def kept_rows(rows: Dataset, missing: Mapping[int, str], empty: str, where: str) -> list[int]:
    """Return the places of the rows that nothing is missing in, and log how many are left out.

    Args:
        missing: in words, what the row at a place has, such as "no text in the column text".
        empty: the value of task.empty.

    Raises UsageError for the first row that lacks something, unless it is to be left out, and if no row is left.
    """
    kept = [place for place in range(len(rows)) if place not in missing]
    if not missing:
        return kept
    first = min(missing)
    what = f"row {row_numbers(rows)[first]} has {missing[first]}"
    if empty == "error":
        more = f" ({len(missing)} such rows in all)" if len(missing) > 1 else ""
        raise UsageError(
            f"{where}: {what}{more}; fill it in, remove the row, or leave out such rows with task.empty: leave_out"
        )
    if not kept:
        raise UsageError(f"{where}: no row is left, since each of them lacks a text or a label: {what}")
    logger.warning("%s: %d of %d rows are left out, the first because %s", where, len(missing), len(rows), what)
    return kept


def _generate(config: DatasetConfig, split: str) -> Dataset:
    assert config.demo is not None
    generate, counts = DEMOS[config.demo]
    if config.demo == "lines" and config.max_rows is not None:  # images take time, so only the selected ones are made
        return Dataset.from_list(demo_lines(split, counts[split], only=_places(counts[split], config.max_rows)))
    return Dataset.from_list(generate(split, counts[split]))


def _spread(rows: Dataset, count: int) -> Dataset:
    """Return `count` rows at equal distances: the first rows of a file often share one label."""
    return rows.select(_places(len(rows), count)) if count < len(rows) else rows


def _places(length: int, count: int) -> list[int]:
    return np.linspace(0, length - 1, min(length, count)).astype(int).tolist()


def _evaluated(config: DatasetConfig, splits: list[str]) -> list[str]:
    """Return the evaluated splits. Raises UsageError if none exists, or if one that the config names is missing."""
    where, has = describe(config), ", ".join(splits)
    if config.train_split not in splits:
        raise UsageError(f"{where} has no split {config.train_split}; it has: {has} (task.dataset.train_split)")
    others = [name for name in splits if name.startswith("validation") and name != config.train_split]
    wanted = config.validation_splits or others
    absent = [name for name in wanted if name not in splits]
    if absent:
        raise UsageError(f"{where} has no split {absent[0]}; it has: {has} (task.dataset.validation_splits)")
    if not wanted:
        raise UsageError(f"{where} has no validation split (it has: {has}); add one, such as validation.jsonl")
    by_name: dict[str, str] = {}
    for split in wanted:
        other = by_name.setdefault(_short(split), split)
        if other != split:
            raise UsageError(
                f"{where}: the splits {other} and {split} would both be {_short(split)} in the metrics; rename one"
            )
    return wanted


def _short(split: str) -> str:
    """Return the name of a split in metrics; `train` is the split that is trained on, whatever its own name."""
    name = split.removeprefix("validation").strip("_-.") or split
    return name if name != "train" else "validation_train"


def _load_folder(folder: Path, config: DatasetConfig) -> dict[str, Dataset]:
    files = _find_files(folder, config)
    wanted = {config.train_split, *(config.validation_splits or [])}
    read = {split: file for split, file in files.items() if split in wanted or split.startswith("validation")}
    splits = {split: read_file(file) if file.parent == folder else _read_images(file) for split, file in read.items()}
    return splits or {file: Dataset.from_list([]) for file in files}


def _find_files(folder: Path, config: DatasetConfig) -> dict[str, Path]:
    """Return the file of each split. Raises UsageError if one that forge reads is empty."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        here = "" if folder.is_absolute() else f" (you are in {Path.cwd()})"
        raise UsageError(
            f"task.dataset.path is {folder}, which {what}{here}; name the folder with {config.train_split}.jsonl in it"
        )
    files = _files_by_split(folder)
    wanted = {config.train_split, *(config.validation_splits or [])}
    for split, file in files.items():
        if (split in wanted or split.startswith("validation")) and file.stat().st_size == 0:
            raise UsageError(f"{file} is empty; forge needs at least one row in each split")
    return files


def _files_by_split(folder: Path) -> dict[str, Path]:
    """Return by split the data files of a folder: train.jsonl, or train/metadata.jsonl for a folder of images."""
    files: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()):
        candidates = sorted(entry.glob(f"{METADATA}.*")) if entry.is_dir() else [entry]
        for file in candidates:
            if file.suffix not in READERS or entry.name.startswith("."):
                continue
            split = entry.name if entry.is_dir() else entry.stem
            if split in files:
                both = f"{files[split].relative_to(folder)} and {file.relative_to(folder)}"
                raise UsageError(f"{folder} has both {both}; keep one file per split")
            files[split] = file
    other = _other_formats(folder) or ("" if files else _in_subfolders(folder))
    if not files:
        raise UsageError(
            f"{folder} has no .jsonl, .parquet or .csv file; forge reads train.jsonl and validation*.jsonl there, or "
            f"train/{METADATA}.jsonl next to its images{other and f'. There is {other}'}"
        )
    if other:
        logger.warning("%s: forge does not read %s", folder, other)
    return files


def _other_formats(folder: Path) -> str:
    """Describe the first file in a format that forge cannot read, and how to convert it; "" if every file is readable.

    Only files that are named like splits count, not a licence or a list of sources.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in OTHER_FORMATS and file.name.startswith(("train", "valid", "test", "dev", "data-")):
            return f"{file.name}: {OTHER_FORMATS[file.suffix]}"
    return ""


def _in_subfolders(folder: Path) -> str:
    """Describe the first data file in a subfolder, as the hub and save_to_disk write them, and how to use it; or ""."""
    for file in sorted(folder.glob("*/*")):
        name = file.relative_to(folder)
        if file.suffix in READERS:
            return f"{name}: put one file for each split into the folder itself, such as train{file.suffix}"
        if file.suffix == ".arrow":
            return f"{name}: {OTHER_FORMATS['.arrow']}"
    return ""


def _read_images(file: Path) -> Dataset:
    """Return the rows of an image folder's metadata, with each image's path as `image` instead of its file_name."""
    rows = read_file(file)
    if "file_name" not in rows.column_names:
        has = ", ".join(rows.column_names)
        raise UsageError(f"{file} has no column file_name, the name of each row's image in its folder; it has: {has}")
    names = [None if name is None else str(name) for name in rows["file_name"]]
    for row, name in enumerate(names):
        if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
            raise UsageError(
                f"{file}: row {row} names an image outside its folder ({name}); keep images inside {file.parent}"
            )
    paths = [None if name is None else str(file.parent.absolute() / name) for name in names]
    return rows.remove_columns(["file_name"]).add_column("image", paths, feature=datasets.Value("string"))


def _load_hub(config: DatasetConfig, *, streaming: bool = False) -> dict[str, Any]:
    logger.info("data: looking for %s in the local cache and on the hub", describe(config))
    try:
        options = {"streaming": True} if streaming else {}
        loaded = datasets.load_dataset(config.name, config.config, revision=config.revision, **options)
    except ForgeError:
        raise
    except Exception as error:  # a library may raise anything, such as RuntimeError for a data set with a script
        offline = " (HF_HUB_OFFLINE is set)" if is_offline_mode() else ""
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the data set {describe(config)} could not be loaded from the hub{offline}: {reason}; check its name "
            "and the network, or give a local folder with task.dataset.path"
        ) from error
    assert isinstance(loaded, dict)  # by split
    return dict(loaded)
