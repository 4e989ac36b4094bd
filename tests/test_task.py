"""Tasks answer for themselves: what teacher caches, plans and losses ask of a task without looking at its class."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversations import config_on, conversation
from test_ocr import TINY, config_of
from transformers import BertConfig, BertForSequenceClassification

from forge.config.loader import load_config
from forge.config.schema import Config, ModelConfig
from forge.config.task_schema import CausalLmTask, OcrTask
from forge.data.fingerprints import text_hash
from forge.errors import UsageError
from forge.task.causal_lm.task import CausalLm
from forge.task.classification import Classification
from forge.task.load import TASKS, load_task, task_class
from forge.task.ocr.task import Ocr
from forge.task.task import task_section

LLAMA = (
    "{model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 1, head_dim: 4, max_position_embeddings: 64}"
)
ROWS = [conversation(i) for i in range(3)]


def loss_and_shapes(config: Config, longest: int | None = None) -> tuple[float, torch.Size, torch.Size]:
    """The loss of a planned batch, and the shapes of its logits and labels."""
    task = task_class(config)
    built = task.adapted_config(config, config.model, task.scratch_config(config.model, "model"))
    batch = task.planned_batch(config, config.model, built, 3, longest)
    model = task.auto_model.from_config(built).eval()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, **task.forward_options).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
    return loss.item(), logits.shape, batch["labels"].shape


def test_every_kind_of_task_has_one_class(config_file: Path) -> None:
    assert [task.name for task in TASKS] == ["classification", "ocr", "causal_lm"]
    assert task_class(load_config(config_file).config) is Classification
    assert task_class(config_of({"demo": "lines"})) is Ocr


def test_a_planned_batch_of_a_causal_lm_is_as_long_as_rows_may_be(tmp_path: Path) -> None:
    settings = ("task.max_length=12", f"model.config={LLAMA}", "model.new_tokenizer={kind: bpe, vocab_size: 310}")
    config = config_on(tmp_path, Path("unused"), ROWS, ROWS, "model.path=null", *settings)
    loss, logits, labels = loss_and_shapes(config)
    assert (logits, labels) == ((3, 12, 310), (3, 12))  # a new tokenizer counts with all its tokens
    assert loss > 0
    assert loss_and_shapes(config, longest=7)[1:] == ((3, 7, 310), (3, 7))
    assert loss_and_shapes(config, longest=70)[2] == (3, 12)


def test_a_planned_batch_of_a_classifier_has_one_label_a_row(config_file: Path, tiny_model: Path) -> None:
    bert = "{model_type: bert, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2}"
    settings = ("model.path=null", f"model.config={bert}", f"model.tokenizer={tiny_model}")
    _, logits, labels = loss_and_shapes(load_config(config_file, settings).config)
    assert (logits, labels) == ((3, 3), (3,))


def test_a_planned_batch_of_a_line_reader_has_images_of_the_models_size() -> None:
    config = config_of({"demo": "lines"}, {"max_length": 9})
    _, logits, labels = loss_and_shapes(config)
    assert labels == (3, 9)
    assert logits[:2] == (3, 9)
    task = task_class(config)
    built = task.scratch_config(config.model, "model")
    assert task.planned_batch(config, config.model, built, 2)["pixel_values"].shape == (2, 1, 16, 64)
    wider = config_of({"demo": "lines"}, {"image": {"height": 32, "width": 128}})
    assert task.planned_batch(wider, config.model, built, 2)["pixel_values"].shape == (2, 1, 32, 128)


def test_a_line_reader_that_does_not_say_its_image_size_needs_it_in_the_config() -> None:
    encoder: Any = SimpleNamespace(num_channels=1)
    model: Any = SimpleNamespace(model_type="vision-encoder-decoder", encoder=encoder)
    config = config_of({"demo": "lines"}, {"image": {"height": 32}})
    with pytest.raises(UsageError, match=r"task\.image\.height and task\.image\.width"):
        Ocr.planned_batch(config, config.model, model, 1)
    encoder.image_size = (16, 64)  # the config's height and the model's width
    assert Ocr.planned_batch(config, config.model, model, 1)["pixel_values"].shape == (1, 1, 32, 64)


def test_a_new_tokenizer_of_another_kind_is_refused_before_any_data_are_read() -> None:
    characters = ModelConfig.model_validate(
        {"config": {"model_type": "llama"}, "new_tokenizer": {"kind": "characters"}}
    )
    with pytest.raises(UsageError, match=r"model\.new_tokenizer\.kind is characters"):
        CausalLm.scratch_config(characters, "model")


@pytest.mark.parametrize(
    ("architecture", "new_head", "labels", "new"),
    [
        ("BertModel", False, 3, True),
        ("BertForSequenceClassification", False, 5, False),
        ("BertForSequenceClassification", True, 3, True),
        (None, False, 3, True),
    ],
)
def test_a_head_starts_new_unless_the_checkpoint_is_a_classifier(
    architecture: str | None, new_head: bool, labels: int, new: bool, config_file: Path
) -> None:
    config = load_config(config_file, [f"model.new_head={str(new_head).lower()}"]).config
    checkpoint = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    checkpoint.num_labels = 5
    checkpoint.architectures = [architecture] if architecture else None
    model = BertForSequenceClassification(checkpoint)
    names = Classification.new_weights(config.model, checkpoint, model)
    assert names == (["classifier.weight", "classifier.bias"] if new else [])
    assert Classification.adapted_config(config, config.model, checkpoint).num_labels == labels


def test_logits_have_a_column_for_each_label_or_for_the_highest_token(config_file: Path, load_lm: Any) -> None:
    classification = load_task(load_config(config_file).config)
    assert (list(classification.label_names), classification.logit_columns) == (
        ["entailment", "neutral", "contradiction"],
        3,
    )
    task = load_lm(ROWS, ROWS)
    tokens = len(task.tokenizer)
    assert (task.label_names, task.logit_columns) == ((), tokens)
    task.tokenizer.get_vocab = lambda: {"a": 0, "b": 700}  # ids with a gap
    assert task.logit_columns == 701


def test_the_key_of_a_teachers_outputs_has_the_template_of_a_chat(load_lm: Any, tmp_path: Path) -> None:
    assert load_lm([{"text": "one two"}], [{"text": "one two"}]).key_parts() == {}
    task = load_lm(ROWS, ROWS)
    assert task.key_parts() == {"the chat template": text_hash(task.encoder.template.text)}
    file = tmp_path / "t.jinja"
    file.write_text(task.encoder.template.text + "{# other #}")
    assert load_lm(ROWS, ROWS, f"task.chat_template={file}").key_parts() != task.key_parts()


def test_the_key_of_a_teachers_outputs_has_how_a_line_is_read() -> None:
    config = config_of({"demo": "lines", "max_rows": 4}, {"max_length": 40})
    task: Any = load_task(config)
    parts = task.key_parts()
    assert parts["the token that a transcript begins after"] == task.tokenizer.bos_token_id
    assert parts["the image processor"] == text_hash(task.processing.image_processor.to_json_string())
    task.processing.image_processor.image_mean = [0.5]
    assert task.key_parts()["the image processor"] != parts["the image processor"]


def test_a_task_with_one_tokenizer_has_none_of_the_teachers() -> None:
    task = load_task(config_of({"demo": "lines", "max_rows": 4}, {"max_length": 40}))
    with pytest.raises(UsageError, match="type ocr"):
        task.for_teacher(task.tokenizer)


def test_a_section_is_of_the_task_that_asks_for_it() -> None:
    config = config_of({"demo": "lines"})
    assert task_section(config, OcrTask) is config.task
    with pytest.raises(TypeError, match="ocr"):
        task_section(config, CausalLmTask)


def test_the_tiny_models_config_is_left_as_it_was() -> None:
    """scratch_config completes a copy: the same section is read again by the plan's next model."""
    before = repr(TINY)
    task_class(config_of({"demo": "lines"})).scratch_config(config_of({"demo": "lines"}).model, "model")
    assert repr(TINY) == before
