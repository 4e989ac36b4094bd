"""Hashes of rows, tokenizers and code, by which data are recognised and caches are named."""

import hashlib
import json
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from forge.errors import UsageError

SPECIAL_TOKENS = ("bos", "eos", "pad", "unk", "sep", "cls")


def rows_hash(splits: dict[str, Dataset]) -> str:
    """Return the SHA-256 over the values of every split: equal if the model sees the same rows in the same order."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(f"{name}:{len(rows)}".encode())
        for batch in rows.with_format("python").iter(batch_size=1000):
            digest.update(repr(sorted(batch.items())).encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of everything that turns text into tokens: equal in every process, before and after use.

    Raises UsageError for a slow tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError("forge needs a fast tokenizer (tokenizer.json), but this model has only a slow one")
    state = json.loads(backend.to_str())
    del state["truncation"], state["padding"]  # set by the last call, and again by the next
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS}
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def source_hash(*files: str | None) -> str:
    """Return the SHA-256 of source files, so that nothing cached by older code is taken for the result of this code."""
    digest = hashlib.sha256()
    for file in files:
        assert file is not None
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()
