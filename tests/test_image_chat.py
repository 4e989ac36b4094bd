"""Chat-style vision-language models: the reply alone is learned, and what is generated follows the same prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from recorded_runs import model_facts, task_facts
from test_ocr import TEXTS, config_of, prediction_of, rows_of, what_the_card_reads, write_images
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaProcessor,
)

from forge.config.schema import LoraConfig, ModelConfig, TrainingConfig
from forge.config.task_schema import ImageConfig
from forge.data.batches import FILLER, row_loader
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.load import LoadedModel, check_fits
from forge.model.lora import with_lora
from forge.model.recognizer import freeze_unused
from forge.report.model_card import usage
from forge.task.ocr.characters import character_tokenizer
from forge.task.ocr.image_chat import image_chat
from forge.task.ocr.task import Ocr, load_ocr

TURN = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ ' ' + c['text'] }}{% endif %}{% endfor %}<end> {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT_MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def tokenizer_with(*tokens: str) -> Any:
    tokenizer = character_tokenizer([])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<end>", *tokens]})
    return tokenizer


def llava() -> tuple[Any, Any]:
    tokenizer = tokenizer_with()
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TURN,
    )
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={**TEXT_MODEL, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    return processor, config


def idefics3() -> tuple[Any, Any]:
    """Cuts an image into pieces, as many as its size asks for: rows have prompts of different lengths."""
    places = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    tokenizer = tokenizer_with("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *places)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=TURN)
    config = Idefics3Config(
        vision_config=VISION,
        text_config={**TEXT_MODEL, "vocab_size": len(tokenizer)},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return processor, config


def test_positions_are_those_of_the_part_that_writes() -> None:
    model = AutoModelForImageTextToText.from_config(llava()[1])

    check_fits(model, 128, TrainingConfig())
    with pytest.raises(UsageError, match="128 positions"):
        check_fits(model, 129, TrainingConfig())


def test_a_template_with_todays_date_writes_the_same_on_every_day() -> None:
    processor, _ = llava()
    processor.chat_template = "{% set form = '%d %b %Y' %}{{ strftime_now(form) }} " + TURN
    chat = image_chat(processor, "Read.", ImageConfig())
    assert chat.opening == "26 Jul 2024 user:<image> Read.<end> assistant:"
    assert "26 Jul 2024" not in processor.apply_chat_template([{"role": "user", "content": []}])  # in use it is today's


@pytest.fixture(params=[llava, idefics3])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    processor, config = request.param()
    folder = tmp_path / "model"
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def ocr_and_model(checkpoint: Path, tmp_path: Path) -> tuple[Ocr, Any]:
    lines = tmp_path / "lines"
    write_images(lines / "train", TEXTS)
    write_images(lines / "validation", TEXTS[:3])
    Image.new("RGB", (20, 20), "white").save(lines / "train" / "1.png")  # of other proportions than the lines
    config = config_of(lines, {"prompt": "Read it."}, {"path": str(checkpoint)})
    ocr = load_ocr(config)
    loaded = ocr.load_model(config.model, config.training)
    return ocr.for_model(loaded), loaded.model.eval()


def test_the_prompt_counts_among_the_positions_of_the_longest_row(checkpoint: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "lines" / "train", TEXTS)
    write_images(tmp_path / "lines" / "validation", TEXTS[:3])

    def loaded(max_length: int) -> Ocr:
        settings = {"prompt": "Read it.", "max_length": max_length}
        config = config_of(tmp_path / "lines", settings, {"path": str(checkpoint)})
        ocr = load_ocr(config)
        ocr.load_model(config.model, config.training)
        return ocr

    ocr = loaded(16)
    longest = max(range(len(ocr.train)), key=lambda i: ocr.train[i]["length"])
    row = ocr.collate(rows_of(ocr, longest))
    prompt = row["input_ids"].shape[1] - int(row["tokens"])
    assert prompt > 0
    loaded(128 - prompt)
    with pytest.raises(UsageError, match="128 positions"):
        loaded(129 - prompt)


def test_the_reply_alone_is_learned_and_the_loss_is_the_models_own(ocr_and_model: tuple[Ocr, Any]) -> None:
    ocr, model = ocr_and_model
    batch = ocr.collate(rows_of(ocr, 0, 1))
    tokenizer = ocr.reader.tokenizer
    for labels, text in zip(batch["labels"], TEXTS, strict=False):
        assert tokenizer.decode(labels[labels != IGNORE]) == f" {text}<end>"
    shown = tokenizer.decode(batch["input_ids"][0])
    assert shown.startswith("user:")
    assert shown.endswith("Read it.<end> assistant: TOTAL 9.50<end>")
    assert int(batch["tokens"]) == int((batch["labels"] != IGNORE).sum())

    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "tokens")}
    logits = model(**inputs, **ocr.forward_options).logits
    assert logits.shape[:2] == batch["labels"].shape
    own = torch.full_like(batch["labels"], IGNORE)
    own[:, 1:] = batch["labels"][:, :-1]  # the model shifts once more
    assert torch.equal(own[own != IGNORE], batch["input_ids"][own != IGNORE])
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(ce, model(**inputs, labels=own).loss)

    ce.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_the_prompt_is_what_the_chat_template_gives_by_itself(ocr_and_model: tuple[Ocr, Any]) -> None:
    ocr, _ = ocr_and_model
    image = Image.open(ocr.train[0]["image"]).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Read it."}]
    expected = ocr.processing.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"add_special_tokens": False},
    )
    inputs = ocr.reader.generation_inputs(ocr.collate(rows_of(ocr, 0)))
    ids = inputs["input_ids"][inputs["attention_mask"].bool()]
    assert torch.equal(ids, expected["input_ids"][0])
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])


def test_a_row_is_read_the_same_alone_and_next_to_a_longer_prompt(ocr_and_model: tuple[Ocr, Any]) -> None:
    ocr, model = ocr_and_model
    ways = {"max_new_tokens": 8, "do_sample": False}
    texts = []
    for ids in ((0, 1), (0,), (1,)):
        batch = {name: tensor for name, tensor in ocr.collate(rows_of(ocr, *ids)).items() if name != "tokens"}
        inputs = ocr.reader.generation_inputs(batch)
        texts.append(ocr.reader.replies(model.generate(**inputs, **ways), inputs))
    assert texts[0] == texts[1] + texts[2]


def test_metrics_read_every_row_once_and_survive_fillers(ocr_and_model: tuple[Ocr, Any]) -> None:
    ocr, model = ocr_and_model
    metrics = ocr.metrics("validation", model)
    batches = [[2, 0], [1], [FILLER]]
    for batch in row_loader(ocr.validation["validation"], batches, ocr.collate):
        metrics.update({}, batch)
    values = metrics.compute()
    assert values["characters"] == sum(map(len, TEXTS[:3]))
    assert [sample.reference for sample in metrics.samples] == TEXTS[:3]
    assert {sample.prompt for sample in metrics.samples} == {"Read it."}


def test_a_chat_model_without_a_prompt_and_too_long_prompts_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    write_images(lines / "train", TEXTS)
    write_images(lines / "validation", TEXTS[:3])
    config = config_of(lines, {"image": {"height": 16, "width": 16}}, {"path": str(checkpoint)})
    with pytest.raises(UsageError, match=r"set task\.prompt"):
        load_ocr(config).load_model(config.model, config.training)
    config = config_of(lines, {"prompt": "Read. " * 30}, {"path": str(checkpoint)})
    with pytest.raises(UsageError, match=r"task\.max_length is .* 128 positions"):
        load_ocr(config).load_model(config.model, config.training)


def test_a_template_that_hides_where_replies_begin_is_refused() -> None:
    processor, _ = llava()
    processor.chat_template = TURN.replace("add_generation_prompt", "false") + "!"
    with pytest.raises(UsageError, match="cannot tell where replies begin"):
        image_chat(processor, "Read it.", ImageConfig())
    processor.chat_template = None
    with pytest.raises(UsageError, match="has no chat template"):
        image_chat(processor, "Read it.", ImageConfig())


@pytest.mark.parametrize("closing", ["#<end>", "</s>", "!"])
def test_what_closes_a_reply_is_learned_to_the_end_token_and_never_shown(closing: str) -> None:
    processor, _ = llava()
    processor.chat_template = TURN.replace("<end> ", closing)
    chat = image_chat(processor, "Read it.", ImageConfig())
    ids = chat.encode(["tea", "No. 7!"])
    learned = {"#<end>": "#<end>", "</s>": "</s>", "!": "!</s>"}[closing]
    assert [processor.tokenizer.decode(row) for row in ids] == [f" tea{learned}", f" No. 7!{learned}"]
    assert chat.decode(ids) == ["tea", "No. 7!"]
    assert processor.tokenizer.convert_ids_to_tokens(chat.end) == ("<end>" if "<end>" in closing else "</s>")


def test_generation_stops_at_the_end_of_the_turn_and_where_the_checkpoint_says(ocr_and_model: tuple[Ocr, Any]) -> None:
    ocr, model = ocr_and_model
    end = ocr.reader.tokenizer.convert_tokens_to_ids("<end>")
    assert model.generation_config.eos_token_id == [end, 2] or model.generation_config.eos_token_id == end
    assert ocr.generation()["eos_token_id"] == model.generation_config.eos_token_id


@pytest.mark.parametrize("size", [{}, {"height": 16, "width": 32}])
def test_the_card_reads_an_image_as_the_evaluation_does(checkpoint: Path, tmp_path: Path, size: dict[str, int]) -> None:
    lines = tmp_path / "lines"
    for split in ("train", "validation"):
        write_images(lines / split, TEXTS[:3])
    config = config_of(lines, {"prompt": "Read 'it'.", "image": size}, {"path": str(checkpoint)})
    ocr = load_ocr(config)
    loaded = ocr.load_model(config.model, config.training)
    ocr, model = ocr.for_model(loaded), loaded.model.eval()
    model.save_pretrained(tmp_path / "final")
    ocr.save_processing(tmp_path / "final")
    card = usage(task_facts(**ocr.about()), model_facts(), None)
    scope = what_the_card_reads(card, tmp_path / "final", lines / "validation" / "1.png")
    row = ocr.collate([ocr.validation["validation"][1]])
    torch.testing.assert_close(scope["inputs"]["pixel_values"], row["pixel_values"])
    assert " ".join(scope["text"].split()) == prediction_of(ocr, model, 1)


@pytest.mark.parametrize("layer", [-1, -2, -4, 1, 2, 3, [-2], [1, -2], [-2, -1]])
@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model"])
def test_what_comes_after_the_vision_layers_that_are_read_is_not_trained(layer: Any, vision: str) -> None:
    processor, config = llava()
    whole = vision == "siglip_vision_model"
    tower = {"model_type": vision, **VISION}
    strategy = "full" if whole else "default"
    config = LlavaConfig(
        vision_config=tower,
        text_config=config.text_config.to_dict(),
        image_token_index=config.image_token_index,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = AutoModelForImageTextToText.from_config(config)
    processor.vision_feature_select_strategy = strategy
    processor.num_additional_image_tokens = 0 if whole else 1
    inputs = dict(processor(images=Image.new("RGB", (16, 16)), text="<image>tea", return_tensors="pt"))
    freeze_unused(model, inputs)
    model(**inputs).logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    read = max(index % 4 for index in (layer if isinstance(layer, list) else [layer]))  # of 3 layers and what precedes
    kept = {
        index
        for index in range(3)
        if any(f"vision_tower.layers.{index}." in n or f"encoder.layers.{index}." in n for n in trained)
    }
    assert kept == set(range(read))

    with_lora(LoadedModel(model, None, [], []), ModelConfig(path="m", lora=LoraConfig(target=["q_proj", "v_proj"])), 0)
    model.zero_grad()
    model(**inputs).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
