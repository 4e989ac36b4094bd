"""Reads the files of a local data set: a text stays the text that the file has, and caches follow the content."""

import csv
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets.data_files import DataFilesList
from datasets.features.features import register_feature
from datasets.packaged_modules.generator.generator import Generator

from forge.data.fingerprints import source_hash, text_hash
from forge.errors import ForgeError, UsageError
from forge.run.files import sha256_of

BOM = b"\xef\xbb\xbf"
INT64 = range(-(2**63), 2**63)
csv.field_size_limit(sys.maxsize)  # the default refuses cells of more than 131,072 characters

Row = dict[str, Any]


@dataclasses.dataclass(repr=False)
class AnyJson:
    """The type of a column whose values are lists, objects, or of several types, kept exactly as the file has them.

    The library's own class for JSON rounds numbers, and reads the text "12" as a number.
    """

    pa_type: ClassVar[Any] = pa.string()
    _type: str = dataclasses.field(default="AnyJson", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value)

    def __repr__(self) -> str:
        return "lists, objects, or values of several types"


with warnings.catch_warnings(action="ignore"):  # the function is called experimental
    register_feature(AnyJson, "AnyJson")


def read_file(file: Path) -> Dataset:
    """Return the rows of a .jsonl, .csv or .parquet file. Raises UsageError if it cannot be read.

    The type of a column follows from all rows of the file: text is never taken for a number or a date, and a key that
    comes late, or is null at first, has the type of its values. All cells of a CSV file are text.
    """
    with _reading(file):
        if file.suffix == ".parquet":  # its columns state their types
            return datasets.load_dataset("parquet", data_files=_files(file, sha256_of(file)), split="train")
        builder = _Typed(
            generator=ROWS_OF[file.suffix],
            gen_kwargs={"file": str(file)},
            config_id=text_hash(f"{sha256_of(file)} {file.suffix} {source_hash(__file__)}")[:32],
        )
        builder.download_and_prepare()
        return builder.as_dataset(split="train")


def stream_file(file: Path) -> IterableDataset:
    """Return the rows of a file one after another, in a new pass each time; of text files as they are written."""
    with _reading(file):
        if file.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=_files(file), split="train", streaming=True)
        return IterableDataset.from_generator(ROWS_OF[file.suffix], gen_kwargs={"file": str(file)})


def jsonl_rows(file: str) -> Iterator[Row]:
    """Yield the objects of a file with one on each line, or with a list of them. Raises ValueError with the line."""
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(BOM) if number == 1 else line
            if number == 1 and text.lstrip().startswith(b"["):
                rows = _parsed(text + lines.read(), "the list")
                yield from (_object(row, f"entry {i} of the list") for i, row in enumerate(rows))
                return
            if text.strip():
                yield _object(_parsed(text, f"line {number}"), f"line {number}")


def csv_rows(file: str) -> Iterator[Row]:
    """Yield the rows of a file by the names in its first line; None where a line ends early.

    Raises ValueError with the line.
    """
    with Path(file).open(newline="", encoding="utf-8-sig") as lines:
        cells = csv.reader(lines, strict=True)  # else a quote that is never closed takes the rest of the file
        try:
            names = [name or f"Unnamed: {i}" for i, name in enumerate(next(cells, []))]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"line 1 names the column {twice[0]} twice")
            for row in cells:
                if len(row) > len(names):
                    raise ValueError(f"line {cells.line_num} has {len(row)} cells, but line 1 names {len(names)}")
                if row:
                    yield dict(zip_longest(names, row))
        except csv.Error as error:
            raise ValueError(f"line {cells.line_num}: {error}") from None


ROWS_OF: dict[str, Callable[[str], Iterator[Row]]] = {".jsonl": jsonl_rows, ".csv": csv_rows}
READERS = (*ROWS_OF, ".parquet")


class _Typed(Generator):
    """Writes rows into the library's cache in columns whose types fit all of them."""

    def _split_generators(self, dl_manager: Any) -> Any:
        self.info.features = features_of(self.config.generator(**self.config.gen_kwargs))
        return super()._split_generators(dl_manager)

    def _generate_examples(self, **gen_kwargs: Any) -> Iterator[Any]:
        names = list(self.info.features)
        for key, row in super()._generate_examples(**gen_kwargs):
            yield key, {name: row.get(name) for name in names}


def features_of(rows: Iterator[Row]) -> Features:
    """Return the columns in the order in which they first come, each of a type that holds all of its values."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            found = kinds.setdefault(name, set())
            if value is not None:
                found.add(object if type(value) is int and value not in INT64 else type(value))
    return Features({name: _feature(found) for name, found in kinds.items()})


def _feature(kinds: set[type]) -> Any:
    if kinds <= {str}:  # also a column of nulls
        return Value("string")
    if kinds == {bool}:
        return Value("bool")
    if kinds <= {int, float}:
        return Value("int64" if kinds == {int} else "float64")
    return AnyJson()


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {error}") from None


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is not a JSON object")
    return value


def _files(file: Path, content: str = "") -> dict[str, DataFilesList]:
    """Return the file as the library takes it: not as a pattern, and cached by its content instead of its time."""
    return {"train": DataFilesList([str(file.absolute())], [(content,)])}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise UsageError for what a library raises inside, and keep it from logging that first."""
    library = logging.getLogger("datasets")
    level = library.level
    library.setLevel(logging.CRITICAL)
    try:
        yield
    except ForgeError:
        raise
    except OSError as error:
        cache = datasets.config.HF_DATASETS_CACHE
        raise UsageError(
            f"{file} cannot be read into the cache {cache} ({error}); set HF_HOME to another folder"
        ) from error
    except Exception as error:  # a library may raise anything for a file that it cannot read
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UsageError(
            f"{file} cannot be read as {file.suffix[1:]} ({reason}); check that it is complete and that text is UTF-8"
        ) from error
    finally:
        library.setLevel(level)
