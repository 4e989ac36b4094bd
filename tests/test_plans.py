"""Plans of DeepSpeed: what is wrong with one, or contradicts the config, is told before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import about, tells
from transformers import LlamaConfig, LlamaForCausalLM

from forge.config.loader import load_config
from forge.config.plans import FOLDER, filled, plan_names, read_plan
from forge.errors import ConfigError, UsageError
from forge.ranks.deepspeed import accelerator_of, round_weights

GOOD = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}


def problem(file: Path, *settings: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(file, settings)
    (text,) = error.value.problems
    return text


def plan_file(folder: Path, **changes: Any) -> Path:
    file = folder / "own.json"
    file.write_text(json.dumps(GOOD | changes))
    return file


def test_every_plan_that_is_shipped_is_taken(config_file: Path) -> None:
    assert plan_names() == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert plan_names(teacher=True) == ["teacher_zero3", "teacher_zero3_offload"]
    for name in plan_names():
        assert load_config(config_file, [f"deepspeed.student={name}"]).config.deepspeed.student == name
    for name in plan_names(teacher=True):
        taught = ["teacher.path=t", "teacher.placement=zero3", "distillation.alpha=0.5", f"deepspeed.teacher={name}"]
        load_config(config_file, [*taught, "deepspeed.student=zero1"])


def test_a_plan_that_is_not_there_is_told_with_those_that_are(config_file: Path) -> None:
    assert problem(config_file, "deepspeed.student=zero4") == (
        about(
            "--set deepspeed.student=zero4: deepspeed.student is zero4: there is no such plan; ds_configs/ has zero1, "
            "zero2, zero2_offload, zero3, zero3_offload, teacher_zero3, teacher_zero3_offload, and a path ends in .json"
        )
    )
    assert "own.json cannot be read (No such file" in problem(config_file, "deepspeed.student=own.json")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"zero_optimization": {"stage": 0}},
            "must be a map with zero_optimization.stage 1, 2 or 3, got stage 0",
        ),
        ({"zero_optimization": {"stage": True}}, "stage True"),
        ({"zero_optimization": 2}, "stage None"),
        ({"bf16": True}, "has bf16 True, but it must be a map"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "zero_optimization.round_robin_gradients"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            "zero_optimization.offload_optimizer 'cpu', but it must be a map",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "device nvme"),
        ({"torch_autocast": {"enabled": True}}, "has torch_autocast, which forge does not support"),
        ({"optimizer": {"type": "Adam"}}, "has optimizer, but training.learning_rate"),
        ({"fp16": {"enabled": True}}, "has fp16, but training.mixed_precision decide"),
        ({"gradient_clipping": 0.5}, "has gradient_clipping 0.5, but training.max_grad_norm is 1.0"),
        ({"train_batch_size": 16}, "has train_batch_size 16, but training.batch_size is 8"),
        ({"gradient_accumulation_steps": 4}, "has gradient_accumulation_steps 4, but that follows from the config"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "has train_micro_batch_size_per_gpu 4, but training.per_device_batch_size is 32",
        ),
        ({"bf16": {"enabled": True}}, "has bf16.enabled true, but training.mixed_precision is no"),
    ],
)
def test_what_contradicts_the_config_names_both_places(
    config_file: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    found = problem(config_file, f"deepspeed.student={plan_file(tmp_path, **changes)}")
    assert tells(found, told)
    assert "own.json" in found


def test_a_plan_that_says_the_same_as_the_config_is_taken(config_file: Path, tmp_path: Path) -> None:
    same = {"gradient_clipping": 1.0, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 32}
    load_config(config_file, [f"deepspeed.student={plan_file(tmp_path, **same)}"])


def test_broken_json_says_where(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 2},}')
    assert "own.json is not JSON (" in (found := problem(config_file, f"deepspeed.student={tmp_path / 'own.json'}"))
    assert "line 1 column" in found


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["teacher.placement=zero3"], "DeepSpeed shards both models or none; set deepspeed.student, such as zero1"),
        (["teacher.placement=zero3", "deepspeed.student=zero1", "deepspeed.teacher=zero2"], "only stage 3 shards"),
        (
            ["teacher.placement=zero3", "deepspeed.student=zero1", "teacher.dtype=float16"],
            "set teacher.dtype to bfloat16 or auto",
        ),
        (["deepspeed.student=teacher_zero3"], "is teacher_zero3, a plan for teachers; take one of zero1, zero2"),
        (["deepspeed.student=zero2", "training.mixed_precision=fp16"], "is fp16, but deepspeed.student is zero2"),
    ],
)
def test_what_does_not_go_together_is_refused(config_file: Path, settings: list[str], told: str) -> None:
    assert tells(problem(config_file, "teacher.path=t", "distillation.alpha=0.5", *settings), told)


def test_another_toolkits_word_is_answered(config_file: Path) -> None:
    assert "fsdp is not a config key: forge shards only with DeepSpeed" in problem(config_file, "fsdp.version=2")


def test_a_plan_of_the_launcher_is_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="ACCELERATE_USE_DEEPSPEED is set: accelerate's launcher, or its config file"):
        accelerator_of(load_config(config_file, []).config)


def test_auto_becomes_what_the_config_says() -> None:
    values = filled(read_plan("zero2"), ranks=4, micro_batches=3, rows=5, max_grad_norm=0.5, bf16=True)
    assert (values["train_batch_size"], values["gradient_accumulation_steps"]) == (60, 3)
    assert (values["train_micro_batch_size_per_gpu"], values["gradient_clipping"]) == (5, 0.5)
    assert (values["bf16"], values["data_types"]) == ({"enabled": True}, {"grad_accum_dtype": "fp32"})
    assert "auto" not in json.dumps(values)
    assert "data_types" not in filled(read_plan("zero2"), ranks=1, micro_batches=1, rows=1, max_grad_norm=0, bf16=False)
    assert "auto" in (FOLDER / "zero2.json").read_text()  # what was read is not what was filled


def test_a_byte_order_mark_at_the_front_of_a_plan_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    assert read_plan(str(tmp_path / "own.json")).values == GOOD


def test_rounded_weights_leave_the_frequencies_of_rotary_embeddings_alone() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    round_weights(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
