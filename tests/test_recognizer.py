"""Models that read lines: the tokens that generation goes by, and what is never trained."""

from pathlib import Path

import pytest
from test_ocr import TEXTS, config_of, rows_of, with_model, write_images

from forge.config.schema import LoraConfig, ModelConfig
from forge.errors import UsageError
from forge.model.load import LoadedModel
from forge.model.lora import with_lora
from forge.model.recognizer import start_token
from forge.task.ocr.task import load_ocr


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        write_images(tmp_path / "lines" / split, TEXTS[:4])
    return tmp_path / "lines"


def test_generation_starts_stops_and_pads_as_training_does_whatever_the_checkpoint_says(
    lines: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ocr, model = with_model(lines)
    ocr.save_processing(tmp_path / "other")
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    model.generation_config.decoder_start_token_id = 5
    model.generation_config.pad_token_id = 9
    model.save_pretrained(tmp_path / "other")
    config = config_of(lines, model={"path": str(tmp_path / "other")})
    loaded = load_ocr(config).load_model(config.model, config.training)
    for holder in (loaded.model.config, loaded.model.generation_config):
        assert (holder.decoder_start_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 0)  # type: ignore[union-attr]
    assert "model: eos_token_id is 7 in its GenerationConfig, now 2" in caplog.text
    assert "model: decoder_start_token_id is 5 in its GenerationConfig, now 1" in caplog.text
    again = load_ocr(config).for_model(loaded)
    batch = again.collate(rows_of(again, 0))
    assert batch["decoder_input_ids"][0, 0] == 1
    assert batch["labels"][0, -1] == 2
    assert again.generation()["decoder_start_token_id"] == 1


def test_the_start_that_only_the_generation_settings_name_is_trained(lines: Path) -> None:
    ocr, model = with_model(lines)
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 5
    assert start_token(model, ocr.reader.tokenizer) == 5


def test_an_adapter_on_what_is_never_used_is_refused_or_left_out(lines: Path) -> None:
    ocr, model = with_model(lines)
    loaded = LoadedModel(model, None, [], [])
    with pytest.raises(UsageError, match=r"names only modules that .* does not use here \(encoder.pooler.dense, 1 in"):
        with_lora(loaded, ModelConfig(path="m", lora=LoraConfig(target=["pooler.dense"])), 0)
    with_lora(loaded, ModelConfig(path="m", lora=LoraConfig(target=["dense", "q_proj"])), 0)
    batch = ocr.collate(rows_of(ocr, 0, 1))
    model(**{name: batch[name] for name in ("pixel_values", "decoder_input_ids")}).logits.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
