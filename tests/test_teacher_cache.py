"""A student learns the same from a teacher's files as from the teacher, and a job that breaks off goes on."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import Death, batch_of, distilled, fill, lm_config, opened, reset
from conftest import REPOSITORY, forge_on_two_ranks, trainer_of
from conversations import conversation
from kd_calls import flat_linear_kd
from teachers import write_chat_teacher, write_classifier
from test_ocr import TEXTS, config_of, with_model, write_images
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
)

from forge.cluster.signals import StopRequest, stopped_early
from forge.config.loader import load_config
from forge.config.schema import Config
from forge.data.batches import FILLER, Batch, with_positions
from forge.errors import Stopped, TrainingError, UsageError
from forge.report.figures import LOWER_IS_BETTER
from forge.run.files import read_json
from forge.task.classification import Classification
from forge.task.load import load_task
from forge.task.task import Task
from forge.teacher_cache import files as storage
from forge.teacher_cache.files import Shard, plan_shards
from forge.teacher_cache.job import cache_teacher
from forge.teacher_cache.reader import token_places
from forge.teacher_cache.top_k import at_temperature, top_k, truncation_kl
from forge.teacher_cache.writer import CacheWriter, index_dtype

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Its outputs are contradiction, entailment, neutral; the data's labels entailment, neutral, contradiction."""
    return write_classifier(tmp_path_factory.mktemp("teacher"), tiny_model)


@pytest.fixture(scope="module")
def chat_teacher(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Path:
    return write_chat_teacher(tmp_path_factory.mktemp("chat_teacher"), chat_model)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    reset()


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def trajectory(trainer: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    before = trainer.evaluate("baseline")
    trainer.train()
    after = trainer.evaluate("final")
    values = {f"{when}/{name}": value for when, found in (("b", before), ("f", after)) for name, value in found.items()}
    return trainer.attempt.callbacks.reports, {name: value for name, value in values.items() if "seconds" not in name}


def assert_same_steps(computed: Any, read: Any, rel: float) -> None:
    for one, other in zip(computed[0], read[0], strict=True):
        for name in ("loss", "ce", "divergence", "hidden", "grad_norm"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=rel), name
    assert set(computed[1]) == set(read[1])
    for name, value in computed[1].items():
        assert read[1][name] == pytest.approx(value, rel=rel, abs=1e-7), name


# What a student learns


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_student_takes_the_same_steps_from_files_as_from_the_teacher(
    build_trainer: Build, config_file: Path, teacher: Path, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both validation splits too, and with no teacher in memory."""
    settings = distilled(teacher, f"distillation.divergence={divergence}", "distillation.temperature=3")
    computed = trajectory(build_trainer(*settings))
    _, manifest = fill(load_config(config_file, settings).config)
    assert {name: split["rows"] for name, split in manifest["splits"].items()} == {
        "train": 48,
        "validation.matched": 13,
        "validation.other": 7,
    }
    assert manifest["labels"] == ["contradiction", "entailment", "neutral"]

    load = Classification.load_model

    def no_teacher(self: Classification, config: Any, training: Any, key: str = "model") -> Any:
        assert key != "teacher", "the teacher is loaded"
        return load(self, config, training, key)

    monkeypatch.setattr(Classification, "load_model", no_teacher)
    read = trajectory(build_trainer(*settings, "teacher.placement=cached"))
    assert_same_steps(computed, read, rel=1e-5)
    assert len(read[0]) == 6
    assert "f/other/kl" in read[1]


def test_one_cache_serves_students_with_labels_in_any_order(
    build_trainer: Build, config_file: Path, teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # The cache was filled in batches padded otherwise, so the last digits of float32 differ with the machine.
    fill(load_config(config_file, distilled(teacher)).config)
    for i, names in enumerate([["neutral", "contradiction", "entailment"], ["contradiction", "entailment", "neutral"]]):
        student = write_classifier(tmp_path / f"student{i}", tiny_model, seed=7, names=names)
        settings = distilled(teacher, f"model.path={student}", "training.max_steps=2")
        computed = trajectory(build_trainer(*settings))
        assert_same_steps(computed, trajectory(build_trainer(*settings, "teacher.placement=cached")), rel=1e-5)


def test_hidden_states_are_those_of_the_teacher_and_zero_at_padding(
    build_trainer: Build, config_file: Path, teacher: Path
) -> None:
    settings = distilled(teacher, "distillation.hidden.layers={0: 0, 2: 1}", "training.max_steps=3")
    config = load_config(config_file, settings).config
    computed = trajectory(build_trainer(*settings))
    folder, manifest = fill(config)
    assert (manifest["layers"], manifest["hidden_widths"]) == ([0, 1], [32, 32, 32])
    assert_same_steps(computed, trajectory(build_trainer(*settings, "teacher.placement=cached")), rel=2e-3)

    task, reader, _ = opened(load_config(config_file, [*settings, "teacher.placement=cached"]).config)
    reader.layers = (1,)
    batch = batch_of(task, 5, 0, 17)
    states = reader.outputs(batch, None, 1.0)["hidden_states.1"]
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[1]
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    assert states.dtype == torch.float16
    torch.testing.assert_close(states[mask].float(), expected[mask], rtol=1e-3, atol=1e-3)
    assert not states[~mask].any()
    assert "hidden_states.1" not in reader.outputs(batch_of(task, 1, split="other"), "other", 1.0)
    tokens = sum(task.train["length"])  # type: ignore[arg-type]
    assert sum(shard["hidden_bytes"] for shard in manifest["shards"]) == tokens * 2 * 32 * 2

    # A run that wants fewer of them, or none, is served by the same folder.
    fewer = distilled(teacher, "distillation.hidden.layers={1: 1}", "teacher.placement=cached")
    assert opened(load_config(config_file, fewer).config)[2].folder == folder
    none = load_config(config_file, distilled(teacher, "teacher.placement=cached")).config
    assert opened(none)[2].folder == folder


def whole_logits(model: Any, task: Task, batch: Batch) -> Tensor:
    """(N, V) of the model at the labels, in float64."""
    inputs = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[batch["positions"]].double()


@pytest.mark.parametrize("packing", [False, True])
def test_a_top_k_is_the_teachers_at_both_temperatures_and_keeps_its_mass(
    tmp_path: Path, chat_model: Path, chat_teacher: Path, packing: bool
) -> None:
    settings = ("teacher.top_k=8", "distillation.temperature=2.5", f"task.packing={packing}")
    config = lm_config(tmp_path, chat_model, chat_teacher, *settings)
    _, manifest = fill(config)
    task, reader, _ = opened(lm_config(tmp_path, chat_model, chat_teacher, *settings, "teacher.placement=cached"))
    assert ("lengths" in task.train.column_names) == packing
    model = AutoModelForCausalLM.from_pretrained(chat_teacher).eval()
    for split, batch in ((None, batch_of(task, 2, 0, 1)), ("validation", batch_of(task, 4, 1, split="validation"))):
        logits = whole_logits(model, task, batch)
        for temperature in (1.0, 2.5):
            expected, places = (logits / temperature).log_softmax(-1).topk(8)
            found = reader.outputs(batch, split, temperature)
            assert torch.equal(found["top_indices"], places)
            assert found["top_indices"].dtype == torch.int64
            torch.testing.assert_close(found["top_log_probs"].double(), expected, rtol=2e-3, atol=2e-3)
            mass = found["top_log_probs"].double().exp().sum(-1)
            torch.testing.assert_close(mass, expected.exp().sum(-1), rtol=1e-6, atol=1e-6)
    assert manifest["dtypes"] == {"indices": "uint16", "log_probs": "float16", "tails": "float32"}
    with pytest.raises(ValueError, match=r"at temperatures 1 and 2.5, not 2.0"):
        reader.outputs(batch, "validation", 2.0)
    with pytest.raises(ValueError, match=r"labels, but .* holds"):
        reader.outputs({**batch, "ids": torch.tensor([0, 1])}, "validation", 1.0)
    assert list(reader.parameters()) == []  # nothing of the teacher is in memory


def test_the_loss_of_a_read_top_k_is_that_of_the_exact_one(
    tmp_path: Path, chat_model: Path, chat_teacher: Path
) -> None:
    settings = ("teacher.top_k=6", "distillation.temperature=2", "teacher.placement=cached")
    fill(lm_config(tmp_path, chat_model, chat_teacher, "teacher.top_k=6"))
    task, reader, _ = opened(lm_config(tmp_path, chat_model, chat_teacher, *settings))
    batch = batch_of(task, 3, 8, 1)
    student = AutoModelForCausalLM.from_pretrained(chat_model)
    told = AutoModelForCausalLM.from_pretrained(chat_teacher).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = student.model(**inputs).last_hidden_state.flatten(0, 1)[batch["positions"]].detach()
    labels = batch["labels"].flatten()[batch["positions"]]
    exact = (whole_logits(told, task, batch) / 2).log_softmax(-1).topk(6)
    found = reader.outputs(batch, None, 2.0)

    def loss(log_probs: Tensor, indices: Tensor) -> Tensor:
        teacher_outputs = {"teacher_log_probs": log_probs, "teacher_indices": indices}
        return flat_linear_kd(hidden, student.lm_head.weight, labels, **teacher_outputs, temperature=2.0)[0].detach()

    by_hand = loss(exact.values.float(), exact.indices)
    torch.testing.assert_close(loss(found["top_log_probs"], found["top_indices"]), by_hand, rtol=1e-4, atol=0)


def test_a_student_of_a_whole_top_k_learns_as_from_the_teacher(
    tmp_path: Path, chat_model: Path, chat_teacher: Path
) -> None:
    settings = ("teacher.top_k=100000", "training.max_steps=2")
    config = lm_config(tmp_path, chat_model, chat_teacher, *settings)
    _, manifest = fill(config)
    assert manifest["top_k"] == manifest["columns"] == len(load_task(config).processing)
    assert manifest["truncation"]["tail_mass"] == 0
    assert manifest["truncation"]["truncation_kl"] == pytest.approx(0, abs=1e-6)
    computed = trajectory(trainer_of(config, tmp_path))
    config = lm_config(tmp_path, chat_model, chat_teacher, *settings, "teacher.placement=cached")
    read = trajectory(trainer_of(config, tmp_path))
    for name in [name for name in read[1] if name.endswith("/kl_top_k")]:
        read[1][name.replace("kl_top_k", "kl")] = read[1].pop(name)
    assert_same_steps(computed, read, rel=2e-3)
    assert opened(config)[2].facts()["cache"]["digest"] == manifest["digest"]


def test_the_kl_of_a_top_k_is_a_lower_bound_and_has_a_name_of_its_own(
    tmp_path: Path, chat_model: Path, chat_teacher: Path
) -> None:
    """Over the k tokens and all others as one, whatever the loss makes of the others."""
    settings = ("teacher.top_k=4", "distillation.missing_mass=renormalise", "teacher.placement=cached")
    config = lm_config(tmp_path, chat_model, chat_teacher, *settings)
    fill(config)
    found = trainer_of(config, tmp_path).evaluate("baseline")
    assert not [name for name in found if name.endswith("/kl")]
    task = load_task(config)
    batch = batch_of(task, *range(5), split="validation")
    student, told = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (chat_model, chat_teacher))
    p, q = (whole_logits(model, task, batch).softmax(-1) for model in (student, told))
    kept = q.topk(4)
    q_k, p_k = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (kept.values, p.gather(-1, kept.indices)))
    assert found["validation/kl_top_k"] == pytest.approx((q_k * (q_k / p_k).log()).sum(-1).mean().item(), rel=1e-3)
    assert found["validation/kl_top_k"] < 0.9 * (q * (q / p).log()).sum(-1).mean().item()
    assert found["validation/agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert "kl_top_k" in LOWER_IS_BETTER


def test_padding_columns_of_a_head_are_no_tokens(tmp_path: Path, chat_model: Path) -> None:
    columns = 400
    teacher = write_chat_teacher(tmp_path / "padded", chat_model, columns=columns)
    _, manifest = fill(lm_config(tmp_path, chat_model, teacher, "teacher.top_k=60"))
    task, reader, _ = opened(lm_config(tmp_path, chat_model, teacher, "teacher.top_k=60", "teacher.placement=cached"))
    tokens = max(task.processing.get_vocab().values()) + 1
    assert manifest["columns"] == tokens < columns
    batch = batch_of(task, 0, 1)
    logits = whole_logits(AutoModelForCausalLM.from_pretrained(teacher).eval(), task, batch)
    assert (logits.topk(60).indices >= tokens).any()
    found = reader.outputs(batch, None, 1.0)
    expected = logits[:, :tokens].log_softmax(-1).topk(60)
    torch.testing.assert_close(found["top_log_probs"].double(), expected.values, rtol=2e-3, atol=2e-3)
    assert (found["top_indices"] < tokens).all()


def test_ids_with_gaps_are_all_tokens(tmp_path: Path, chat_model: Path, load_lm: Callable[..., Any]) -> None:
    task = load_lm([conversation(0)], [conversation(1)])
    vocabulary = task.processing.get_vocab()
    task.processing.get_vocab = lambda: {**vocabulary, "far": 999}
    assert task.logit_columns == 1000


def test_numbers_of_tokens_fit_their_dtype() -> None:
    assert [index_dtype(columns) for columns in (1 << 16, (1 << 16) + 1)] == ["uint16", "int32"]


SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.5},
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (GraniteConfig, {"logits_scaling": 0.3}),
        (Gemma2Config, {"final_logit_softcapping": 1.5, "head_dim": 8}),
        (PhiConfig, {}),  # its head has a bias
    ],
)
def test_what_lies_between_head_and_logits_is_computed(
    tmp_path: Path, chat_model: Path, family: Any, options: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    own = AutoModelForCausalLM.from_pretrained(chat_model).config
    special = {"vocab_size": own.vocab_size, "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
    model = AutoModelForCausalLM.from_config(family(**SIZES, **special, **options)).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias, std=2.0)
    folder = write_chat_teacher(tmp_path / "teacher", chat_model)
    model.save_pretrained(folder)
    fill(lm_config(tmp_path, chat_model, folder))
    task, reader, _ = opened(lm_config(tmp_path, chat_model, folder, "teacher.placement=cached"))
    batch = batch_of(task, 0, 1)
    expected = whole_logits(model, task, batch).log_softmax(-1).topk(64).values
    found = reader.outputs(batch, None, 1.0)["top_log_probs"].double()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_hidden_states_of_the_same_tokens_are_padded_on_the_students_side(
    config_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Of a teacher with other inputs, whose own tokenizer pads the other side."""
    folder = write_classifier(tmp_path / "left", tiny_model)
    file = folder / "tokenizer_config.json"
    values = {
        **json.loads(file.read_text()),
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    file.write_text(json.dumps(values))
    settings = distilled(folder, "distillation.hidden.layers={1: 1}")
    fill(load_config(config_file, settings).config)
    cached = load_config(config_file, [*settings, "teacher.placement=cached"]).config
    task, reader, _ = opened(cached)
    assert isinstance(task, Classification)
    assert task.teacher_tokenizer is not None
    batch = batch_of(task, 5, 0, 17)
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    assert torch.equal(batch["teacher_attention_mask"].bool(), mask)
    reader.layers = (1,)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = {name: batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[1]
    states = reader.outputs(batch, None, 1.0)["hidden_states.1"]
    torch.testing.assert_close(states[mask].float(), expected[mask], rtol=1e-3, atol=1e-3)


def test_a_small_head_of_an_ocr_model_is_kept_whole(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_images(tmp_path / "lines" / split, TEXTS[:5])
    ocr, model = with_model(tmp_path / "lines")
    ocr.save_processing(tmp_path / "teacher")
    model.save_pretrained(tmp_path / "teacher")
    values = config_of(tmp_path / "lines").model_dump()
    values |= {"teacher": {"path": str(tmp_path / "teacher")}, "output_root": str(tmp_path / "outputs")}
    values |= {"distillation": {"alpha": 0.5, "divergence": "reverse_kl"}, "training": {"num_workers": 0}}
    _, manifest = fill(Config.model_validate(values))
    assert manifest["kept"] == "whole logits"
    task, reader, _ = opened(Config.model_validate({**values, "teacher": {**values["teacher"], "placement": "cached"}}))
    batch = batch_of(task, 3, 1)
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("pixel_values", "decoder_input_ids")}).logits
    expected = logits.flatten(0, 1)[batch["positions"]]
    torch.testing.assert_close(reader.outputs(batch, None, 7.0)["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("placement", "used"), [("offload", "offload"), ("cached", "replicated")])
def test_a_job_offloads_the_teacher_if_the_config_does(
    config_file: Path, teacher: Path, placement: str, used: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "forge")
    fill(load_config(config_file, distilled(teacher, f"teacher.placement={placement}")).config)
    assert f"teacher: {teacher}, {used}, float32" in caplog.text


# The formulas


def test_what_is_reported_is_what_a_hand_computes(tmp_path: Path, chat_model: Path, chat_teacher: Path) -> None:
    settings = ("teacher.top_k=4", "distillation.temperature=1.7")
    folder, manifest = fill(lm_config(tmp_path, chat_model, chat_teacher, *settings))
    task = load_task(lm_config(tmp_path, chat_model, chat_teacher))
    batch = batch_of(task, *range(5), split="validation")
    logits = whole_logits(AutoModelForCausalLM.from_pretrained(chat_teacher).eval(), task, batch)
    q = (logits / 1.7).softmax(-1)
    kept = q.topk(4)
    tail = 1 - kept.values.sum(-1, keepdim=True)
    spread = (tail / (q.shape[1] - 4)).expand_as(q).scatter(1, kept.indices, kept.values)
    kl = (q * (q / spread).log()).sum(-1).mean().item()

    assert manifest["truncation"]["labels"] == len(batch["positions"])
    assert manifest["truncation"]["truncation_kl"] == pytest.approx(kl, rel=1e-3)
    assert kl > 0.1
    assert manifest["truncation"]["tail_mass"] == pytest.approx(tail.mean().item(), rel=1e-5)
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    labels = sum(len(batch_of(task, i, split=split)["positions"]) for split, n in ((None, 14), ("validation", 5))
                 for i in range(n))  # fmt: skip
    assert (manifest["bytes"], manifest["labels_in_all"]) == (sum(sizes), labels)
    assert manifest["bytes_per_label"] == sum(sizes) / labels
    assert manifest["share_of_whole_logits"] == pytest.approx(sum(sizes) / labels / 4 / q.shape[1])
    arrays = 4 * (2 + 2) + 2 * 4  # k float16 and k uint16, two float32
    assert arrays * labels < manifest["bytes"] < arrays * labels + 19 * 8 + 2 * 8 + 1200  # offsets, headers


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_rounding_moves_no_mass(temperature: float) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 6
    logits[0, 5] = -torch.inf  # a token that cannot come
    for k in (1, 16, 300):
        kept = top_k(logits, k, temperature)
        read = at_temperature(kept.log_probs, kept.tails[:, 1], temperature)
        exact = (logits.double() / temperature).log_softmax(-1)
        q = exact.gather(1, kept.indices)
        np.testing.assert_allclose(read.double().exp().sum(1), q.exp().sum(1), rtol=0, atol=1e-6)
        lost = truncation_kl(logits, kept, temperature)
        tail = kept.tails[:, 1:].double()
        torch.testing.assert_close(tail.squeeze(1), 1 - q.exp().sum(1), rtol=1e-4, atol=1e-7)
        even = (tail / max(1, 300 - k)).log().expand_as(exact).scatter(1, kept.indices, q)
        by_hand = torch.where(exact.exp() > 0, exact.exp() * (exact - even), 0.0).sum(1)
        torch.testing.assert_close(lost.double(), by_hand, rtol=0.05, atol=2e-3)
        assert torch.isfinite(lost).all()


def test_tokens_lie_where_the_mask_has_them() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]])  # padded at the right, and at the left
    assert token_places({"attention_mask": mask}, [2, 3, 1], 4, mask.device).tolist() == [0, 1, 5, 6, 7, 11]
    assert token_places({}, [2, 0, 3], 4, mask.device).tolist() == [0, 1, 8, 9, 10]


def test_shards_have_so_many_rows_and_bytes_and_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SHARD_ROWS", 4)
    monkeypatch.setattr(storage, "SHARD_BYTES", 10)
    assert plan_shards("train", np.array([1, 1, 1, 1, 1, 9, 2, 30, 1])) == [
        Shard("train", 0, 0, 4),
        Shard("train", 1, 4, 2),
        Shard("train", 2, 6, 1),
        Shard("train", 3, 7, 1),
        Shard("train", 4, 8, 1),
    ]


# The files


def test_mapped_files_read_as_memory_does_and_fillers_as_nothing(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SHARD_ROWS", 10)
    settings = distilled(teacher, "distillation.hidden.layers={1: 2}")
    fill(load_config(config_file, settings).config)
    cached = load_config(config_file, [*settings, "teacher.placement=cached"]).config
    outputs = []
    for limit in (storage.IN_MEMORY_BYTES, 0):
        monkeypatch.setattr(storage, "IN_MEMORY_BYTES", limit)
        task, reader, _ = opened(cached)
        reader.layers = (2,)
        outputs.append(reader.outputs(batch_of(task, 47, 9, 10, 31, 0), None, 1.0))
    for name in ("logits", "hidden_states.2"):
        assert torch.equal(outputs[0][name], outputs[1][name])
    row = torch.stack([reader.outputs(batch_of(task, i), None, 1.0)["logits"][0] for i in (47, 9, 10, 31, 0)])
    assert torch.equal(row, outputs[0]["logits"])
    filler = with_positions(task.collate([task.train[0]]), [FILLER])
    empty = reader.outputs(filler, None, 1.0)
    assert empty["logits"].shape == (0, 3)
    assert not empty["hidden_states.2"].any()


@pytest.mark.parametrize("at", [0, 1, 2, 3, 6, 11, 12])
def test_a_job_that_dies_at_any_write_goes_on_to_the_same_bytes(
    config_file: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Writes: the key, then each of 6 shards with its record, then the manifest."""
    monkeypatch.setattr(storage, "SHARD_ROWS", 13)
    unbroken, _ = fill(load_config(config_file, distilled(teacher, f"output_root={tmp_path / 'unbroken'}")).config)
    expected = shard_bytes(unbroken)
    assert len(expected) == 6

    settings = distilled(teacher, f"output_root={tmp_path / 'broken'}")
    replaced, replace = [], os.replace

    def dies(source: Path, target: Path) -> None:
        if len(replaced) == at:
            raise Death
        replaced.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(Death):
            fill(load_config(config_file, settings).config)
    with pytest.raises(UsageError, match="has no cache for this config" if at == 0 else "is not complete; resume `"):
        opened(load_config(config_file, [*settings, "teacher.placement=cached"]).config)

    computed: list[Shard] = []
    compute = CacheWriter.compute
    monkeypatch.setattr(CacheWriter, "compute", lambda self, shard: computed.append(shard) or compute(self, shard))
    folder, _ = fill(load_config(config_file, settings).config)
    assert shard_bytes(folder) == expected
    assert len(computed) == 6 - max(0, at - 1) // 2  # a shard without its record is computed again
    opened(load_config(config_file, [*settings, "teacher.placement=cached"]).config)


def test_a_stop_keeps_the_finished_shards_and_says_how_to_go_on(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SHARD_ROWS", 13)
    stop, compute = StopRequest(), CacheWriter.compute

    def signalled(self: CacheWriter, shard: Shard) -> Any:
        if (shard.split, shard.number) == ("train", 2):
            stop.reason = "SIGTERM"
            raise stopped_early("SIGTERM")
        return compute(self, shard)

    monkeypatch.setattr(CacheWriter, "compute", signalled)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM; 2 of 6 shards are in .*; run the same command again"):
        cache_teacher(load_config(config_file, distilled(teacher)).config, stop)


SMALL_SHARDS = (
    "import sys; from forge.teacher_cache import files; files.SHARD_ROWS = 3; from forge.cli.main import main; "
)
SLOWLY = (
    "import time; from forge.teacher_cache.writer import CacheWriter; compute = CacheWriter.compute; "
    "CacheWriter.compute = lambda self, shard: (time.sleep(0.05), compute(self, shard))[1]; "
)


@pytest.mark.usefixtures("warm_starts")
def test_a_killed_command_goes_on_where_it_was(
    config_file: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = distilled(teacher, "evaluation.teacher=false", f"output_root={tmp_path / 'outputs'}")
    code = f"{SLOWLY}{SMALL_SHARDS}sys.exit(main(['cache-teacher', *sys.argv[1:]]))"
    command = [sys.executable, "-c", code, str(config_file), *(f"--set={item}" for item in settings)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    root = tmp_path / "outputs" / ".teacher_caches"
    deadline = time.monotonic() + 120
    while len(list(root.glob("*/*.safetensors.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=60)
    (folder,) = root.iterdir()
    assert not (folder / "manifest.json").exists()
    finished = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors.json")}

    monkeypatch.setattr(storage, "SHARD_ROWS", 3)
    caplog.set_level(logging.INFO, "forge")
    fill(load_config(config_file, settings).config)
    assert f"{len(finished)} of 24 shards are there already" in caplog.text
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert not list(folder.glob(".*.tmp"))
    other = [f"output_root={tmp_path / 'unbroken'}", "evaluation.teacher=false"]
    unbroken, _ = fill(load_config(config_file, distilled(teacher, *other)).config)
    assert shard_bytes(folder) == shard_bytes(unbroken)


@pytest.mark.multiprocess
def test_two_ranks_fill_the_cache_that_one_does(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    alone, manifest = fill(load_config(config_file, distilled(teacher)).config)
    settings = [f"--set={item}" for item in distilled(teacher, "evaluation.teacher=false")]
    arguments = ("forge.cli", "cache-teacher", config_file, "--output_root", tmp_path / "two", *settings)
    done = forge_on_two_ranks(*arguments, script="-m")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "two" / ".teacher_caches").iterdir()
    assert folder.name == alone.name
    together = read_json(folder / "manifest.json")
    for name in ("splits", "key", "columns", "labels"):
        assert together[name] == manifest[name]
    for file in shard_bytes(alone):
        ours, theirs = (storage.safe_open(place / file, "np") for place in (alone, folder))
        for name in sorted(ours.keys()):
            np.testing.assert_allclose(ours.get_tensor(name), theirs.get_tensor(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("writes", [0, 1, 2, 7])
def test_a_full_disk_is_one_sentence_and_the_next_job_goes_on(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """As the key, a shard, its record or the manifest is written."""
    replaced, replace = [], os.replace

    def full(source: Path, target: Path) -> None:
        if len(replaced) == writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced.append(target)
        replace(source, target)

    config = load_config(config_file, distilled(teacher)).config
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(TrainingError, match=r"could not be written \(No space left on device\); free some space"):
            fill(config)
    folder, _ = fill(config)
    assert not list(folder.glob(".*.tmp"))
