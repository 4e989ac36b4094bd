"""Names what the tokens of a row depend on beside the row itself: the tokenizer, and forge's own code."""

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from forge.errors import UsageError

SPECIAL_TOKENS = ("bos", "eos", "pad", "unk", "sep", "cls")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what makes tokens of a text: equal in every process, before and after the tokenizer's use.

    Raises UsageError for a slow tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError("forge needs a fast tokenizer (tokenizer.json), and this model has only a slow one")
    state = json.loads(backend.to_str())
    del state["truncation"], state["padding"]  # left behind by the last call, and set anew by the next
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS}
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def source_hash(*files: str | None) -> str:
    """SHA-256 of source files: what they made and left on disk is not taken for what they would make once changed."""
    digest = hashlib.sha256()
    for file in files:
        assert file is not None
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()
