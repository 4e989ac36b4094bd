"""What a config's own values come to: rows of a step, whether a teacher is needed, absolute paths, offloading plans."""

from pathlib import Path

import pytest

from forge.config.explain import with_absolute_paths
from forge.config.loader import load_config
from forge.config.plans import filled, read_plan
from forge.config.schema import Config, TrainingConfig
from forge.config.source import MAX_DEPTH, read_setting

CLASSIFIER = "task: {type: classification, dataset: {path: data}}\nmodel: {path: m}\n"
LM = "task: {type: causal_lm, dataset: {path: data}, chat_template: chat.jinja}\nmodel: {path: m}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *settings: str) -> Config:
    Path("c.yaml").write_text(text)
    return load_config(Path("c.yaml"), settings).config


@pytest.mark.parametrize(
    ("batch_size", "ranks", "shape", "largest"),
    [(64, 2, (64, 1), 32), (65, 2, (65, 2), 17), (20, 1, (20, 1), 20), (100, 1, (100, 4), 25), (33, 1, (33, 2), 17)],
)
def test_micro_batches_are_as_few_as_fit_and_equally_large(
    batch_size: int, ranks: int, shape: tuple[int, int], largest: int
) -> None:
    training = TrainingConfig(batch_size=batch_size, per_device_batch_size=32)
    assert training.step_shape(ranks) == shape
    assert training.micro_batch_rows(ranks) == largest


def test_without_a_batch_size_the_rows_of_a_step_grow_with_the_ranks() -> None:
    training = TrainingConfig(per_device_batch_size=8, gradient_accumulation_steps=3)
    assert [training.step_shape(ranks) for ranks in (1, 4)] == [(24, 3), (96, 3)]
    assert training.micro_batch_rows(4) == 8


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ((), False),
        (("teacher.path=t", "evaluation.teacher=true"), True),
        (("teacher.path=t", "evaluation.teacher=false"), False),
        (("teacher.path=t", "distillation.alpha=0.5"), True),
    ],
)
def test_a_teacher_is_wanted_to_train_or_to_compare_with(settings: tuple[str, ...], wanted: bool) -> None:
    assert load(CLASSIFIER, *settings).wants_teacher is wanted


def test_folders_and_files_of_a_recorded_config_are_absolute(tmp_path: Path) -> None:
    for name in ("data", "m", "kept"):
        Path(name).mkdir()
    given = ("teacher.path=t", "teacher.placement=cached", "teacher.cache=kept", "distillation.alpha=0.5")
    recorded = with_absolute_paths(load(LM, *given, "deepspeed.student=zero2"))
    assert recorded.task.model_dump()["chat_template"] == str(tmp_path / "chat.jinja")
    assert recorded.task.dataset.path == str(tmp_path / "data")
    assert (recorded.model.path, recorded.teacher.cache) == (str(tmp_path / "m"), str(tmp_path / "kept"))
    assert recorded.teacher.path == "t"  # not a folder here: the name of a hub model, or of a run
    assert (recorded.deepspeed.student, recorded.output_root) == ("zero2", str(tmp_path / "outputs"))


@pytest.mark.parametrize(("name", "optimizer", "weights"), [
    ("zero2", False, False), ("zero2_offload", True, False), ("zero3", False, False), ("zero3_offload", True, True),
])  # fmt: skip
def test_a_plan_knows_what_it_offloads(name: str, optimizer: bool, weights: bool) -> None:
    plan = read_plan(name)
    assert (plan.offloads_optimizer, plan.offloads_weights) == (optimizer, weights)
    values = filled(plan, ranks=1, micro_batches=1, rows=1, max_grad_norm=0, bf16=True)
    assert values.get("zero_force_ds_cpu_optimizer") is (False if optimizer else None)


def test_a_device_of_none_offloads_nothing() -> None:
    Path("own.json").write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}')
    assert not read_plan("own.json").offloads_optimizer


def test_maps_may_be_as_deep_as_the_limit_and_no_deeper() -> None:
    def nested(depth: int) -> list[str]:
        return read_setting(f"model.config={'{a: ' * depth}1{'}' * depth}").problems

    assert nested(MAX_DEPTH) == []
    (problem,) = nested(MAX_DEPTH + 1)
    assert str(MAX_DEPTH) in problem
