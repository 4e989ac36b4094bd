"""Writes the final model in a folder that from_pretrained loads."""

from pathlib import Path

from transformers import PreTrainedModel


def export_model(model: PreTrainedModel, folder: Path) -> None:
    """Saves the weights as safetensors, and the model's config, into a new folder."""
    model.save_pretrained(folder)
