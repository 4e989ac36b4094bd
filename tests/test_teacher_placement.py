"""A teacher gives the same outputs, in the dtype that the config asks for, wherever it is placed."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from teachers import write_classifier

from forge.config.loader import load_config
from forge.config.teacher_schema import DistillationConfig, TeacherConfig
from forge.data.batches import with_positions
from forge.task.load import load_task
from forge.teacher.placement import LoadedTeacher, label_columns, load_teacher, teacher_dtype
from forge.teacher.teacher import ModelTeacher, teacher_layers


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    reset()
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def classifier(tmp_path: Path, tiny_model: Path) -> Path:
    return write_classifier(tmp_path / "teacher", tiny_model)


def placed(file: Path, teacher: Path, *settings: str, precision: str = "no", columns: Any = None) -> Any:
    """A teacher in its placement, and its logits of three training rows."""
    reset()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    config = load_config(file, [f"teacher.path={teacher}", "distillation.alpha=0.5", *settings]).config
    task = load_task(config)
    source = LoadedTeacher(load_teacher(config, task), config.teacher)
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float32}
    model = source.place(accelerator, task, columns)
    batch = with_positions(task.collate([task.train[i] for i in range(3)]), [0, 1, 2])
    return model, model.outputs(batch, None, 1.0)["logits"]


def test_in_bf16_training_a_teacher_is_rounded_to_bfloat16_in_every_placement(
    config_file: Path, classifier: Path
) -> None:
    _, exact = placed(config_file, classifier)
    teacher, replicated = placed(config_file, classifier, precision="bf16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert replicated.dtype == torch.bfloat16
    assert not torch.equal(replicated.float(), exact)
    teacher, offloaded = placed(config_file, classifier, "teacher.placement=offload", precision="bf16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}
    assert torch.equal(offloaded, replicated)


@pytest.mark.parametrize(
    ("wanted", "precision", "dtype"),
    [
        ("auto", "no", torch.float32),
        ("auto", "bf16", torch.bfloat16),
        ("auto", "fp16", torch.bfloat16),  # float16 would overflow where bfloat16 does not
        ("float32", "bf16", torch.float32),
        ("bfloat16", "no", torch.bfloat16),
        ("float16", "no", torch.float16),
    ],
)
def test_the_dtype_follows_the_training_unless_it_is_named(wanted: Any, precision: str, dtype: torch.dtype) -> None:
    accelerator: Any = SimpleNamespace(mixed_precision=precision)
    assert teacher_dtype(TeacherConfig(dtype=wanted), accelerator) == dtype


def test_logits_come_in_the_students_order_of_labels(config_file: Path, classifier: Path) -> None:
    _, own = placed(config_file, classifier)
    _, reordered = placed(config_file, classifier, columns=[2, 0, 1])
    assert torch.equal(reordered, own[:, [2, 0, 1]])


def test_columns_give_each_output_of_the_student_the_teachers_of_the_same_label() -> None:
    # For the labels a, b, c: the student's outputs are c, a, b and the teacher's b, c, a.
    assert label_columns([1, 2, 0], [2, 0, 1]) == [1, 2, 0]
    assert label_columns([1, 2, 0], [1, 2, 0]) is None
    assert label_columns([], []) is None


def test_a_teacher_is_frozen_and_in_eval_mode(config_file: Path, classifier: Path) -> None:
    teacher, logits = placed(config_file, classifier)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.model.modules())
    assert not logits.requires_grad
    assert teacher.loaded.model is teacher.model


def test_the_layers_of_a_placed_teacher_can_be_compiled(config_file: Path, classifier: Path) -> None:
    teacher, _ = placed(config_file, classifier)
    teacher.compile()
    assert all(layer._compiled_call_impl is not None for layer in teacher.model.bert.encoder.layer)


def test_closing_a_teacher_destroys_its_engine() -> None:
    class Engine(torch.nn.Module):
        destroyed = 0

        def destroy(self) -> None:
            self.destroyed += 1

    engine, model = Engine(), torch.nn.Linear(1, 1)
    ModelTeacher(model, {}, module=engine).close()  # type: ignore[arg-type]
    ModelTeacher(model, {}).close()  # type: ignore[arg-type]
    assert engine.destroyed == 1


def test_layers_are_matched_only_where_hidden_states_have_a_weight_in_the_loss() -> None:
    hidden = DistillationConfig.model_validate({"alpha": 0.5, "hidden": {}})
    assert teacher_layers(hidden, 2, 4) == (0, 2, 4)
    assert teacher_layers(hidden.model_copy(update={"alpha": 0.0}), 2, 4) == ()
    assert teacher_layers(DistillationConfig(alpha=0.5), 2, 4) == ()
    named = DistillationConfig.model_validate({"alpha": 0.5, "hidden": {"layers": {1: 3, 2: 1}}})
    assert teacher_layers(named, 0, 3) == (1, 3)  # the student's depth follows from the pairs
