"""Writes the final model, weights and tokenizer, in a folder that from_pretrained loads."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves safetensors and tokenizer into a new folder."""
    model.save_pretrained(folder)
    # Tokenizing leaves its truncation and padding behind in the tokenizer, and whoever loads it would truncate too.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
