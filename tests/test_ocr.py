"""Images and transcripts become batches, and what an encoder-decoder writes becomes error rates."""

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, forge, forge_on_two_ranks, python
from datasets import Dataset, DatasetDict
from PIL import Image
from recorded_runs import model_facts, task_facts
from transformers import AutoModelForImageTextToText, AutoProcessor

from forge.config.schema import Config
from forge.config.task_schema import ImageConfig
from forge.data.batches import FILLER, row_loader
from forge.data.demo.lines import Draw, Look, render
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.report.model_card import usage
from forge.run.files import read_json_lines
from forge.task.ocr.characters import character_tokenizer
from forge.task.ocr.line_reader import line_reader, new_processor
from forge.task.ocr.task import Ocr, load_ocr

TEXTS = ["TOTAL 9.50", "tea", "Cash: 12", "No. 77/A", "GST", "2 x egg", "07-11-18", "Thank you!"]
TINY = {
    "model_type": "vision-encoder-decoder",
    "encoder": {
        "model_type": "vit",
        "image_size": [16, 64],
        "patch_size": [16, 8],
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.2,
    },
    "decoder": {
        "model_type": "trocr",
        "d_model": 16,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 32,
        "init_std": 0.2,
        "dropout": 0.0,
    },
}


def write_images(folder: Path, texts: list[str], metadata: str = "jsonl") -> Path:
    """A split of an image folder, one PNG for each text."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = Draw("train", 0)
    for i, text in enumerate(texts):
        (folder / f"{i}.png").write_bytes(render(text, Look(draw)))
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    if metadata == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_csv(str(folder / "metadata.csv"))
    return folder


def with_repository() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    write_images(tmp_path / "lines" / "train", TEXTS)
    write_images(tmp_path / "lines" / "validation", TEXTS[:5])
    return tmp_path / "lines"


def config_of(dataset: Any, task: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> Config:
    source = {"path": str(dataset)} if isinstance(dataset, Path) else dataset
    return Config.model_validate(
        {
            "task": {"type": "ocr", "dataset": source, "max_length": 16, **(task or {})},
            "model": model or {"config": TINY, "new_tokenizer": {"kind": "characters"}},
        }
    )


def load(dataset: Any, task: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> Ocr:
    return load_ocr(config_of(dataset, task, model))


def with_model(dataset: Any, task: dict[str, Any] | None = None) -> tuple[Ocr, Any]:
    config = config_of(dataset, task)
    torch.manual_seed(0)
    ocr = load_ocr(config)
    loaded = ocr.load_model(config.model, config.training)
    return ocr.for_model(loaded), loaded.model.eval()


def rows_of(ocr: Ocr, *ids: int) -> list[dict[str, Any]]:
    return [ocr.train[i] for i in ids]


def test_a_folder_of_images_gives_rows_with_tokens_and_lengths(lines: Path) -> None:
    ocr = load(lines)
    assert ocr.train["text"][:] == TEXTS
    assert ocr.validation["validation"]["text"][:] == TEXTS[:5]
    tokenizer = ocr.reader.tokenizer
    assert ocr.train["length"][:] == [len(text) + 1 for text in TEXTS]
    assert ocr.train[1]["tokens"] == [*tokenizer.convert_tokens_to_ids(list("tea")), tokenizer.eos_token_id]
    assert isinstance(ocr.train[0]["image"], str), "images stay files until a batch is made"
    facts = ocr.facts()
    assert facts["rows"] == {"train": 8, "validation": 5}
    assert facts["image_size"] == [16, 64]
    assert facts["normalization"].startswith("case kept, Unicode NFC, whitespace collapsed; training transcripts")


def test_csv_metadata_and_an_image_column_give_the_same_rows_and_fingerprint(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ocr = load(lines)
    for split, texts in {"train": TEXTS, "validation": TEXTS[:5]}.items():
        write_images(tmp_path / "csv" / split, texts, metadata="csv")
    assert load(tmp_path / "csv").fingerprint == ocr.fingerprint

    def hub_rows(split: str) -> Dataset:
        files = [str(path) for path in sorted((lines / split).glob("*.png"))]
        return Dataset.from_dict({"picture": files, "words": TEXTS[: len(files)]}).cast_column(
            "picture", datasets.Image()
        )

    hub = DatasetDict(train=hub_rows("train"), validation=hub_rows("validation"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    from_hub = load({"name": "some/lines"}, {"columns": {"image": "picture", "text": "words"}})
    assert from_hub.fingerprint == ocr.fingerprint
    torch.testing.assert_close(from_hub.collate(rows_of(from_hub, 3)), ocr.collate(rows_of(ocr, 3)))
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    for split, rows in hub.items():
        rows.to_parquet(str(parquet / f"{split}.parquet"))
    monkeypatch.undo()
    embedded = load(parquet, {"columns": {"image": "picture", "text": "words"}})
    assert embedded.fingerprint == ocr.fingerprint
    assert load(lines, {"normalization": {"case": "lower"}}).fingerprint != ocr.fingerprint


def test_the_fingerprint_sees_another_image_with_the_same_name(lines: Path) -> None:
    before = load(lines).fingerprint
    assert load(lines).fingerprint == before
    (lines / "train" / "3.png").write_bytes(render(TEXTS[3], Look(Draw("train", 7))))
    assert load(lines).fingerprint != before


def test_the_fingerprint_sees_another_tokenizer(lines: Path, tmp_path: Path) -> None:
    tokenizer = load(lines).reader.tokenizer
    for name in ("own", "other"):
        tokenizer.save_pretrained(tmp_path / name)
    state = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(state))
    own, other = (load(lines, model={"config": TINY, "tokenizer": str(tmp_path / name)}) for name in ("own", "other"))

    assert own.fingerprint == load(lines).fingerprint
    assert own.fingerprint != other.fingerprint


def test_a_checkpoints_own_way_to_generate_changes_no_metric(lines: Path) -> None:
    ocr, model = with_model(lines)
    (batch,) = row_loader(ocr.validation["validation"], [[0, 1, 2]], ocr.collate)

    def read() -> list[str]:
        metrics = ocr.metrics("validation", model)
        metrics.update({}, batch)
        return [sample.prediction for sample in metrics.samples]

    expected = read()
    odd = {"num_return_sequences": 2, "repetition_penalty": 2.0, "no_repeat_ngram_size": 1, "length_penalty": 2.0}
    model.generation_config.update(**odd, num_beams=3, min_new_tokens=12)
    assert read() == expected
    assert {name: getattr(model.generation_config, name) for name in odd} == odd


def test_the_loss_is_the_models_own(lines: Path) -> None:
    ocr, model = with_model(lines)
    batch = ocr.collate(rows_of(ocr, 0, 1, 7))
    inputs = {name: batch[name] for name in ("pixel_values", "decoder_input_ids")}
    logits = model(**inputs, **ocr.forward_options).logits
    assert logits.shape[:2] == batch["labels"].shape == (3, 11)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)
    own = model(pixel_values=batch["pixel_values"], labels=batch["labels"])
    torch.testing.assert_close(ce, own.loss)
    counted = batch["labels"] != IGNORE
    torch.testing.assert_close(logits[counted], own.logits[counted])
    assert int(batch["tokens"]) == 11 + 4 + 11 == int((batch["labels"] != IGNORE).sum())


def test_a_row_is_read_the_same_alone_and_in_a_batch_of_longer_ones(lines: Path) -> None:
    ocr, model = with_model(lines)
    both, alone = ocr.collate(rows_of(ocr, 1, 0)), ocr.collate(rows_of(ocr, 1))
    logits = [
        model(pixel_values=batch["pixel_values"], decoder_input_ids=batch["decoder_input_ids"]).logits
        for batch in (both, alone)
    ]
    torch.testing.assert_close(logits[0][0, :4], logits[1][0])


def test_every_weight_that_is_trained_gets_a_gradient_and_the_pooler_is_not_trained(lines: Path) -> None:
    ocr, model = with_model(lines)
    batch = ocr.collate(rows_of(ocr, 0, 1))
    model(**{name: batch[name] for name in ("pixel_values", "decoder_input_ids")}).logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert {name for name, _ in model.named_parameters()} - trained == {
        "encoder.pooler.dense.weight",
        "encoder.pooler.dense.bias",
    }


def test_what_is_saved_writes_the_same_text_with_transformers_alone(lines: Path, tmp_path: Path) -> None:
    ocr, model = with_model(lines)
    final = tmp_path / "final"
    model.save_pretrained(final)
    ocr.save_processing(final)
    again, processor = AutoModelForImageTextToText.from_pretrained(final), AutoProcessor.from_pretrained(final)
    pixels = ocr.collate(rows_of(ocr, 0))["pixel_values"]
    assert torch.equal(
        again.generate(pixels, max_new_tokens=9, do_sample=False),
        model.generate(pixels, max_new_tokens=9, do_sample=False),
    )
    tokenizer = ocr.reader.tokenizer
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for holder in (again.config, again.generation_config):
        assert (holder.decoder_start_token_id, holder.eos_token_id, holder.pad_token_id) == special == (1, 2, 0)
    assert processor.tokenizer.decode(ocr.train[0]["tokens"], skip_special_tokens=True) == TEXTS[0]

    config = config_of(lines, model={"path": str(final)})
    resumed = load_ocr(config)
    loaded = resumed.load_model(config.model, config.training)
    torch.testing.assert_close(resumed.for_model(loaded).collate(rows_of(resumed, 0)), ocr.collate(rows_of(ocr, 0)))
    assert not loaded.new_weights


def what_the_card_reads(card: str, final: Path, image: Path) -> dict[str, Any]:
    """What is in scope after the model card's lines."""
    code = card.partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("PATH OF THIS FOLDER", str(final)).replace("PATH OF AN IMAGE", str(image)), scope)
    return scope


def prediction_of(ocr: Ocr, model: Any, row: int) -> str:
    metrics = ocr.metrics("validation", model)
    (batch,) = row_loader(ocr.validation["validation"], [[row]], ocr.collate)
    metrics.update({}, batch)
    return metrics.samples[0].prediction


@pytest.mark.parametrize("image", [{}, {"stretch": True}, {"fill": 40}])
def test_the_card_reads_an_image_as_the_evaluation_does(lines: Path, tmp_path: Path, image: dict[str, Any]) -> None:
    ocr, model = with_model(lines, {"image": image, "num_beams": 2})
    final = tmp_path / "final"
    model.save_pretrained(final)
    ocr.save_processing(final)
    for row in (0, 3):
        file = lines / "validation" / f"{row}.png"
        assert Image.open(file).size != (64, 16)
        scope = what_the_card_reads(usage(task_facts(**ocr.about()), model_facts(), None), final, file)
        assert scope["ways"]["num_beams"] == 2
        assert torch.equal(scope["pixels"], ocr.reader.pixels([Image.open(file)]))  # type: ignore[union-attr]
        assert " ".join(scope["text"].split()) == prediction_of(ocr, model, row)


def test_a_processor_that_is_given_an_unfit_image_does_not_stretch_it(lines: Path, tmp_path: Path) -> None:
    ocr, model = with_model(lines)
    ocr.save_processing(tmp_path)
    pixels = AutoProcessor.from_pretrained(tmp_path)(images=Image.new("L", (90, 30)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 1, 30, 90)
    with pytest.raises(ValueError, match="doesn't match"):
        model.generate(pixels)


def test_a_tokenizer_without_padding_pads_with_its_end(lines: Path) -> None:
    tokenizer = character_tokenizer(TEXTS)
    tokenizer.pad_token = None
    reader = line_reader(new_processor(tokenizer, TINY), ImageConfig())
    batch = reader.collate([Image.new("L", (9, 9))] * 2, [[5, 2], [5, 6, 2]])
    assert batch["decoder_input_ids"].tolist() == [[1, 5, 2], [1, 5, 6]]
    assert batch["labels"].tolist() == [[5, 2, IGNORE], [5, 6, 2]]


def test_metrics_are_those_of_what_generate_writes(lines: Path) -> None:
    ocr, model = with_model(lines)
    metrics = ocr.metrics("validation", model)
    loader = row_loader(ocr.validation["validation"], [[0, 2], [4, 1], [3], [FILLER]], ocr.collate)
    written = {}
    for batch in loader:
        metrics.update({}, batch)
        texts = ocr.reader.decode(model.generate(batch["pixel_values"], max_new_tokens=16).tolist())
        written |= dict(zip(batch["ids"].tolist(), texts, strict=True))
    assert len(written) == 6
    assert [sample.row for sample in metrics.samples] == [0, 1, 2, 3]
    assert [sample.reference for sample in metrics.samples] == TEXTS[:4]
    assert [sample.prediction for sample in metrics.samples] == [" ".join(written[i].split()) for i in range(4)]
    assert metrics.samples[1].image is not None
    assert Image.open(BytesIO(metrics.samples[1].image)).size == Image.open(lines / "validation" / "1.png").size
    values = metrics.compute()
    assert values["characters"] == sum(map(len, TEXTS[:5]))
    assert values["words"] == 8


def test_error_rates_are_summed_over_rows_and_ranks_before_they_are_divided(
    lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ocr, model = with_model(lines, {"normalization": {"case": "lower"}})
    said = ["total 9.5", "tea", "", "NO. 77/A  ", "gst tax"]  # for TOTAL 9.50 | tea | Cash: 12 | No. 77/A | GST
    ranks = [ocr.metrics("validation", model), ocr.metrics("validation", model)]
    for rank, ids in enumerate(([0, 1, 2], [3, 4])):
        monkeypatch.setattr(type(ocr.reader), "replies", lambda *_, ids=ids: [said[i] for i in ids])
        (batch,) = row_loader(ocr.validation["validation"], [ids], ocr.collate)
        ranks[rank].update({}, batch)
    ranks[0].counts += ranks[1].counts
    # Edits: 1 of 10, 0 of 3, 8 of 8, 0 of 8 (case and space do not count), 4 of 3. Words: 1 of 2, 0, 2 of 2, 0, 1 of 1.
    assert ranks[0].compute() == {
        "cer": 13 / 32,
        "wer": 4 / 8,
        "exact_match": 2 / 5,
        "empty_predictions": 1,
        "characters": 32,
        "words": 8,
    }


def test_a_transcript_beyond_max_length_is_cut_and_counted_and_scored_whole(lines: Path) -> None:
    ocr = load(lines, {"max_length": 8})
    assert ocr.truncated == {"train": 5, "validation": 3}
    assert max(ocr.train["length"][:]) == 8
    assert ocr.reader.decode([ocr.train[0]["tokens"]]) == ["TOTAL 9."]
    assert ocr.validation["validation"][0]["text"] == "TOTAL 9.50"


def test_images_that_are_missing_or_broken_are_named_or_left_out_and_counted(
    lines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = lines / "train"
    whole = (train / "4.png").read_bytes()
    (train / "2.png").unlink()
    (train / "4.png").write_bytes(whole[: len(whole) // 2])
    (train / "6.png").write_text("no image")
    with pytest.raises(UsageError) as error:
        load(lines)
    assert str(error.value).startswith(f"{lines}, train: row 2, image {train}/2.png (there is no such file)")
    assert "and 2 more" in str(error.value)
    assert "task.skip_broken: true" in str(error.value)

    ocr = load(lines, {"skip_broken": True})
    assert ocr.train["text"][:] == [text for i, text in enumerate(TEXTS) if i not in (2, 4, 6)]
    assert ocr.facts()["broken_images"] == {"train": 3, "validation": 0}
    assert "3 of 8 images cannot be read and are left out" in caplog.text
    assert f"row 4, image {train}/4.png" in caplog.text
    assert "6.png (it is not an image" in caplog.text
    for file in train.glob("*.png"):
        file.unlink()
    with pytest.raises(UsageError, match=r"none of its 8 images can be read, the first is row 0, image .*0\.png"):
        load(lines, {"skip_broken": True})


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": "x"}], "metadata.jsonl has no column file_name"),
        ([{"file_name": "/0.png", "text": "x"}], r"row 0 names an image outside its folder \(/0.png\)"),
        ([{"file_name": n, "text": "x"} for n in ("0.png", "../a.png")], r"row 1 names an image outside .*\.\./a\.png"),
        ([{"file_name": None, "text": "x"}], r"row 0, image null \(there is none\) cannot be read; replace it"),
        ([{"file_name": "0.png", "words": "x"}], "train: there is no column text; it has: words, image"),
        ([{"file_name": "0.png", "text": 3}], r"the column text \(task.columns.text\) holds .*int64.*, not text"),
        ([{"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": " "}], "row 1 has an empty transcript"),
        ([{"file_name": "0.png", "text": None}, {"file_name": "1.png", "text": "x"}], "row 0 has an empty transcript"),
    ],
)
def test_metadata_that_cannot_be_learned_from_is_refused(
    lines: Path, rows: list[dict[str, Any]], sentence: str
) -> None:
    (lines / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=sentence):
        load(lines)


def test_a_character_that_the_tokenizer_cannot_write_is_named_with_its_row(lines: Path, tmp_path: Path) -> None:
    ocr, model = with_model(lines)
    model.save_pretrained(tmp_path / "final")
    ocr.save_processing(tmp_path / "final")
    write_images(lines / "train", [*TEXTS, "5.00 \N{EURO SIGN}"])
    assert "\N{EURO SIGN}" in load(lines).reader.tokenizer.get_vocab()  # a new tokenizer learns it
    with pytest.raises(UsageError, match=r"train: row 8 has the character '€' \(U\+20AC\) in its transcript '5.00 €'"):
        load(lines, model={"path": str(tmp_path / "final")})
    write_images(lines / "train", [*TEXTS, "\N{FULLWIDTH DIGIT FIVE}"])
    with pytest.raises(UsageError, match="row 8 has the character '５'"):
        load(lines, model={"path": str(tmp_path / "final")})
    plain = load(lines, {"normalization": {"unicode": "nfkc"}}, {"path": str(tmp_path / "final")})
    assert plain.train[8]["text"] == "5"
    write_images(lines / "train", [*TEXTS, "a </s> b"])  # reads as the end token, and would be lost
    with pytest.raises(UsageError, match="row 8 has a piece in its transcript"):
        load(lines)


def test_rows_are_named_by_their_place_in_the_data_where_max_rows_keeps_some(lines: Path) -> None:
    data = {"path": str(lines), "max_rows": 3}  # rows 0, 3 and 7 of 8
    (lines / "train" / "7.png").write_text("no image")
    with pytest.raises(UsageError, match=r"train: row 7, image .*7\.png"):
        load(data)
    ocr = load(data, {"skip_broken": True})
    assert (ocr.train["row"][:], ocr.train["text"][:]) == ([0, 3], [TEXTS[0], TEXTS[3]])
    write_images(lines / "train", [*TEXTS[:7], " "])
    with pytest.raises(UsageError, match="train: row 7 has an empty transcript"):
        load(data)
    write_images(lines / "train", [*TEXTS[:7], "a </s> b"])
    with pytest.raises(UsageError, match="train: row 7 has a piece in its transcript"):
        load(data)


def test_a_long_transcript_is_cut_without_noise(lines: Path) -> None:
    code = (
        f"from pathlib import Path; from test_ocr import load; ocr = load(Path({str(lines)!r}), {{'max_length': 8}})\n"
        "assert ocr.truncated == {'train': 5, 'validation': 3}"
    )
    done = python("-c", code, cwd=Path(__file__).parent, **with_repository())
    assert done.returncode == 0, done.stderr
    assert "longer than" not in done.stderr


def test_sizes_that_the_model_cannot_take_are_refused(lines: Path) -> None:
    for task, sentence in (
        ({"image": {"height": 32}}, "reads images of 16 x 64 .* makes them 32 x 64; set task.image.height: 16"),
        ({"max_length": 33}, "task.max_length is 33, .* 32 positions"),
        ({"prompt": "What does it say?"}, "model is of type vision-encoder-decoder, .* task.prompt"),
    ):
        with pytest.raises(UsageError, match=sentence):
            with_model(lines, task)
    for part, sentence in (
        ({"decoder": None}, r"model.config.decoder is missing or has no model_type, such as trocr"),
        ({"encoder": {**TINY["encoder"], "depth": 3}}, "model.config.encoder.depth is not a setting of vit models"),  # type: ignore[dict-item]
        ({"height": 3}, "model.config.height is not a setting of vision-encoder-decoder models: encoder, decoder"),
    ):
        model = {"config": {**TINY, **part}, "new_tokenizer": {"kind": "characters"}}
        config = config_of(lines, model=model)
        with pytest.raises(UsageError, match=sentence):
            load_ocr(config).load_model(config.model, config.training)
    with pytest.raises(UsageError, match=r"kind is bpe, .* of kind characters"):
        load(lines, model={"config": TINY, "new_tokenizer": {"kind": "bpe"}})


def test_pixels_are_normalised_around_paper(lines: Path) -> None:
    ocr = load(lines)
    Image.new("L", (40, 20), 128).save(lines / "train" / "0.png")
    pixels = ocr.collate(rows_of(ocr, 0))["pixel_values"]
    assert pixels.shape == (1, 1, 16, 64)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[0, 0, :, :32], (128 / 255 - 0.9) / 0.25, rtol=1e-5)  # 40 x 20 becomes 32 x 16
    np.testing.assert_allclose(pixels[0, 0, :, 32:], (1 - 0.9) / 0.25, rtol=1e-4)  # padding is white


@pytest.mark.multiprocess
def test_two_ranks_read_and_learn_as_one_does(lines: Path, tmp_path: Path) -> None:
    config = tmp_path / "lines.yaml"
    model = {"config": TINY, "new_tokenizer": {"kind": "characters"}}
    config.write_text(f"""
task: {{type: ocr, dataset: {{path: {lines}}}, max_length: 16}}
model: {json.dumps(model)}
training: {{max_steps: 4, per_device_batch_size: 2, batch_size: 4, learning_rate: 3e-3, adam_epsilon: 1e-3,
  mixed_precision: no, num_workers: 1}}
evaluation: {{per_device_batch_size: 3}}
logging: {{every_steps: 1}}
output_root: {tmp_path / "outputs"}
""")
    alone, both = (
        forge("--config", config, "--run_name", "alone"),
        forge_on_two_ranks("--config", config, "--run_name", "both"),
    )
    assert alone.returncode == 0, alone.stderr
    assert both.returncode == 0, both.stderr

    runs = tmp_path / "outputs" / "lines"
    one, two = (read_json_lines(runs / name / "metrics.jsonl") for name in ("alone", "both"))
    losses, others = ([row["loss"] for row in rows if "loss" in row] for rows in (one, two))
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert others == pytest.approx(losses, rel=1e-5)
    assert two[-1]["validation/ce"] == pytest.approx(one[-1]["validation/ce"], rel=1e-5)
    names = [f"validation/{name}" for name in ("cer", "wer", "exact_match", "rows", "characters")]
    assert [two[-1][name] for name in names] == [one[-1][name] for name in names]
    final = runs / "both" / "final"
    image = Image.open(lines / "validation" / "0.png")
    task = load(lines, model={"path": str(runs / "both")})
    reader = AutoModelForImageTextToText.from_pretrained(final)
    written = reader.generate(task.reader.pixels([image]), max_new_tokens=16, do_sample=False)  # type: ignore[union-attr]
    samples = read_json_lines(runs / "both" / "samples" / "final-4" / "samples.jsonl")
    assert [sample["row"] for sample in samples] == [0, 1, 2, 3], "so many in all, not on each rank"
    assert samples[0]["prediction"] == " ".join(task.reader.decode(written.tolist())[0].split())
    assert (runs / "both" / "samples" / "final-4" / samples[0]["image"]).is_file()
    by_the_card = what_the_card_reads((final / "README.md").read_text(), final, lines / "validation" / "0.png")
    assert samples[0]["prediction"] == " ".join(by_the_card["text"].split())
