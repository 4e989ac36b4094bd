"""A teacher's own metrics are those of the model, from every placement; they are evaluated once and read later."""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from caches import reset
from conftest import REPOSITORY, forge, pair_rows, python
from conversations import config_on, conversation
from test_ocr import TINY, write_images
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from forge.attempt.resume import ResumePoint, check_teacher
from forge.cluster.signals import StopRequest
from forge.config.loader import load_config
from forge.config.schema import Config
from forge.errors import Stopped, TrainingError, UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.origin import Origin, WeightFiles, hash_of_files
from forge.run.files import read_json, read_json_lines
from forge.student import teacher_metrics as storage
from forge.student.teacher_metrics import (
    evaluate_teacher,
    keep_teacher_metrics,
    metrics_file,
    metrics_key,
    store_metrics,
    stored_metrics,
    teacher_metrics,
)
from forge.task.load import load_task
from forge.teacher.placement import LoadedTeacher, label_columns, load_teacher
from forge.teacher.teacher import ModelTeacher
from forge.teacher_cache import key as keys
from forge.teacher_cache.job import FilledCache, cache_teacher
from forge.teacher_cache.key import digest

LABELS = ["entailment", "neutral", "contradiction"]
SHUFFLED = ["contradiction", "entailment", "neutral"]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def classifier(tmp_path: Path, tiny_model: Path) -> Path:
    """A teacher whose outputs are in another order than the data's labels, with sharp logits."""
    torch.manual_seed(3)
    names = {"id2label": dict(enumerate(SHUFFLED)), "label2id": {name: i for i, name in enumerate(SHUFFLED)}}
    model = BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3, **names)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    folder = tmp_path / "classifier"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def metrics_of(config: Config, accelerator: Accelerator, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The teacher's, without the seconds."""
    task = load_task(config)
    source = LoadedTeacher(load_teacher(config, task), config.teacher)
    columns = label_columns(list(range(3)), source.label_ids) if source.label_ids else None
    teacher = source.place(accelerator, task, columns)
    metrics = evaluate_teacher(config, task, teacher, accelerator, between)
    assert metrics is not None
    assert not any(module.training for module in teacher.model.modules())
    return {name: value for name, value in metrics.items() if not name.endswith("/seconds")}


def with_teacher(file: Path, teacher: Path, *settings: str) -> Config:
    return load_config(file, [f"teacher.path={teacher}", "evaluation.teacher=true", *settings]).config


def test_a_classifiers_metrics_are_those_of_its_model(
    classifier: Path, config_file: Path, accelerator: Accelerator
) -> None:
    model = BertForSequenceClassification.from_pretrained(classifier).double().eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(classifier)
    losses, right = [], []
    for row in pair_rows(13, offset=100):  # validation_matched, one by one
        with torch.no_grad():
            logits = model(**tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")).logits[0]
        label = SHUFFLED.index(LABELS[int(str(row["label"]))])
        losses.append(-logits.log_softmax(0)[label].item())
        right.append(int(logits.argmax()) == label)
    found = metrics_of(with_teacher(config_file, classifier), accelerator)
    assert found["matched/ce"] == pytest.approx(sum(losses) / 13, abs=1e-5)
    assert found["matched/accuracy"] == pytest.approx(sum(right) / 13)
    assert found["other/rows"] == 7
    assert not [name for name in found if name.endswith(("/agreement", "/kl"))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_classifier_has_the_same_metrics(
    dtype: str, classifier: Path, config_file: Path, accelerator: Accelerator
) -> None:
    found = [
        metrics_of(
            with_teacher(config_file, classifier, f"teacher.dtype={dtype}", f"teacher.placement={where}"), accelerator
        )
        for where in ("replicated", "offload")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("placement", ["replicated", "offload"])
def test_a_language_models_metrics_are_those_of_its_model(
    placement: str, tmp_path: Path, chat_model: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_on(
        *(tmp_path, chat_model, [conversation(i) for i in range(8)], [conversation(i, 2) for i in range(20, 25)]),
        *(f"teacher.path={chat_model}", "evaluation.teacher=true", f"teacher.placement={placement}"),
    )
    monkeypatch.setattr(
        "forge.task.causal_lm.metrics.generate_replies", lambda *_, **__: pytest.fail("a teacher shows no texts")
    )
    found = metrics_of(config, accelerator)
    task = load_task(config)
    rows = task.validation["validation"]
    model = AutoModelForCausalLM.from_pretrained(chat_model).double().eval()
    assert AutoTokenizer.from_pretrained(chat_model).get_vocab() == task.processing.get_vocab()
    ce_sum, right, labels = 0.0, 0, 0
    for row in rows:
        ids, learned = torch.tensor(row["input_ids"]), torch.tensor(row["learned"]).bool()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        targets = torch.where(learned, ids, IGNORE)[1:]
        counted = targets != IGNORE
        ce_sum -= logits.log_softmax(-1)[counted, targets[counted]].sum().item()
        right += int((logits.argmax(-1) == targets)[counted].sum())
        labels += int(counted.sum())
    assert found["validation/labels"] == labels
    assert found["validation/ce"] == pytest.approx(ce_sum / labels, abs=1e-5)
    assert found["validation/perplexity"] == pytest.approx(math.exp(ce_sum / labels), rel=1e-5)
    assert found["validation/token_accuracy"] == pytest.approx(right / labels)


def test_a_reader_of_lines_is_the_same_offloaded_and_writes_texts_in_half_precision(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    texts = ["TOTAL 9.50", "tea", "Cash: 12", "No. 77/A", "GST", "2 x egg"]
    for split in ("train", "validation"):
        write_images(tmp_path / "lines" / split, texts)
    config = Config.model_validate(
        {
            "task": {"type": "ocr", "dataset": {"path": str(tmp_path / "lines")}, "max_length": 16},
            "model": {"config": TINY, "new_tokenizer": {"kind": "characters"}},
            "evaluation": {"teacher": True, "max_rows": 4},
            "training": {"num_workers": 0},
        }
    )
    task = load_task(config)
    torch.manual_seed(0)
    task.load_model(config.model, config.training).model.save_pretrained(tmp_path / "reader")
    task.save_processing(tmp_path / "reader")

    def of(**teacher: str) -> dict[str, Any]:
        named = config.teacher.model_copy(update={"path": str(tmp_path / "reader"), **teacher})
        return metrics_of(config.model_copy(update={"teacher": named}), accelerator)

    whole, half = of(), of(dtype="bfloat16")
    assert (whole["validation/rows"], whole["validation/rows_of"]) == (4, 6)
    assert whole["validation/cer"] > 0.5
    assert of(placement="offload") == whole
    assert half["validation/ce"] == pytest.approx(whole["validation/ce"], rel=0.02)
    assert half["validation/ce"] != whole["validation/ce"]


def test_weights_that_are_not_finite_name_the_teacher(
    classifier: Path, config_file: Path, accelerator: Accelerator
) -> None:
    model = BertForSequenceClassification.from_pretrained(classifier)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained(classifier)
    with pytest.raises(TrainingError, match=r"matched/ce of the teacher .*classifier is nan in float32: a student"):
        metrics_of(with_teacher(config_file, classifier), accelerator)


def test_a_stop_breaks_it_off(classifier: Path, config_file: Path, accelerator: Accelerator) -> None:
    def stop() -> None:
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        metrics_of(with_teacher(config_file, classifier), accelerator, stop)


class Task:
    """As much of a task as a key asks for."""

    fingerprint = "f" * 64
    processing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "<unk>": 1}, "<unk>")))
    tokenizer = processing
    teacher_tokenizer = None
    train, validation = (), {}  # type: ignore[var-annotated]

    def key_parts(self) -> dict[str, Any]:
        return {}


ORIGIN = Origin(WeightFiles(name="t", location="/t", sha256="a" * 64))
METRICS = {"matched/ce": 0.5, "matched/perplexity": math.inf, "matched/rows": 13}


@pytest.fixture(autouse=True)
def _config_of_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ORIGIN, whose folder is not there."""
    load = keys.load_model_config
    monkeypatch.setattr(
        keys, "load_model_config", lambda source, name: BertConfig() if source.location == "/t" else load(source, name)
    )


@pytest.fixture
def config(config_file: Path) -> Config:
    return load_config(config_file, ["evaluation.teacher=true", "teacher.path=t"]).config


def key_of(config: Config, origin: Origin = ORIGIN, dtype: str = "float32") -> dict[str, Any]:
    return metrics_key(config, Task(), origin, dtype)  # type: ignore[arg-type]


def test_metrics_are_evaluated_once_for_each_key(
    config: Config, accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return METRICS

    def ask(origin: Origin | None = ORIGIN, compute: Callable[[], dict[str, Any] | None] = compute) -> Any:
        return teacher_metrics(config, Task(), origin, accelerator, compute, "the run a")  # type: ignore[arg-type]

    caplog.set_level(logging.INFO)
    assert ask(compute=lambda: None) is None
    assert "teacher.placement: cached" in caplog.text
    assert "`forge cache-teacher`" in caplog.text
    assert [ask(), ask(), ask(compute=lambda: None)] == [METRICS] * 3
    assert len(calls) == 1
    assert caplog.text.count("the run a stored at 20") == 2
    assert ask(Origin(WeightFiles(name="t", location="/t", sha256="b" * 64))) == METRICS
    assert ask(None) == METRICS  # a teacher whose files are not known is evaluated each time
    assert len(calls) == 3
    assert len(list((tmp_path / "outputs" / ".teachers").iterdir())) == 2


def test_a_file_that_cannot_be_used_is_warned_of_once_and_replaced(
    config: Config, accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, key = tmp_path / "outputs", key_of(config)
    file = root / ".teachers" / f"{digest(key)[:16]}.json"
    store_metrics(root, key, METRICS, "a")
    whole = file.read_text()
    another = json.dumps({**json.loads(whole), "key": key_of(config, dtype="bfloat16")})
    for broken in (whole[:40], "[]", '{"key": {}}', whole.replace("matched/", ""), another):
        file.write_text(broken)
        caplog.clear()
        found = teacher_metrics(config, Task(), ORIGIN, accelerator, lambda: {"matched/ce": 0.7}, "b")  # type: ignore[arg-type]
        assert found == {"matched/ce": 0.7}
        assert caplog.text.count("cannot be used") == 1
        stored = stored_metrics(root, key)
        assert stored is not None
        assert (stored.metrics, stored.made_by) == ({"matched/ce": 0.7}, "b")


def test_metrics_stored_under_a_former_name_are_read_under_the_current_one(config: Config, tmp_path: Path) -> None:
    store_metrics(tmp_path, key_of(config), {"matched/ce": 0.5, "matched/accuracy": 0.8}, "a")
    file = metrics_file(tmp_path, key_of(config))
    file.write_text(file.read_text().replace("matched/ce", "matched/loss"))
    found = stored_metrics(tmp_path, key_of(config))
    assert found is not None
    assert found.metrics == {"matched/ce": 0.5, "matched/accuracy": 0.8}


def test_metrics_that_another_version_counted_differently_are_not_used(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_metrics(tmp_path, key_of(config), METRICS, "a")
    assert stored_metrics(tmp_path, key_of(config)) is not None
    monkeypatch.setattr(storage, "METRICS_VERSION", storage.METRICS_VERSION + 1)
    assert stored_metrics(tmp_path, key_of(config)) is None


def test_a_folder_that_cannot_be_written_is_a_warning(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "outputs").write_text("")
    store_metrics(tmp_path / "outputs", key_of(config), METRICS, "a")
    assert "could not be stored" in caplog.text


def test_the_key_holds_what_the_metrics_depend_on(config_file: Path) -> None:
    def key(*settings: str) -> str:
        return digest(key_of(load_config(config_file, ["evaluation.teacher=true", "teacher.path=t", *settings]).config))

    assert key("training.learning_rate=1", "training.seed=3", "evaluation.per_device_batch_size=2") == key()
    others = (
        ("evaluation.max_rows=5",),
        ("evaluation.max_rows=6",),
        ("evaluation.max_rows=5", "training.seed=3"),
        ("task.max_length=16",),
        ("teacher.labels=[a, b, c]",),
        ("task.dataset.max_rows=20",),
    )
    assert len({key(), *(key(*settings) for settings in others)}) == 1 + len(others)
    file = load_config(config_file, ["evaluation.teacher=true", "teacher.path=t"]).config
    assert len({digest(key_of(file)), digest(key_of(file, dtype="bfloat16"))}) == 2


def test_the_command_keeps_the_metrics_that_runs_will_want_and_no_others(
    classifier: Path, config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And it loads the teacher only to evaluate it."""

    def filled(*settings: str) -> FilledCache:
        reset()
        return cache_teacher(with_teacher(config_file, classifier, *settings), StopRequest())

    def unwanted() -> ModelTeacher:
        raise AssertionError("the teacher is evaluated")

    caplog.set_level(logging.INFO, "forge")
    cache = filled("evaluation.teacher=false")
    keep_teacher_metrics(replace(cache, teacher=unwanted))
    assert not (Path(cache.config.output_root) / ".teachers").exists()
    cache = filled()
    keep_teacher_metrics(cache)
    key = metrics_key(cache.config, cache.task, cache.origin, "float32")
    stored = stored_metrics(Path(cache.config.output_root), key)
    assert stored is not None
    assert stored.made_by == "forge cache-teacher"
    keep_teacher_metrics(replace(cache, teacher=unwanted))
    assert caplog.text.count(f"matched/accuracy {stored.metrics['matched/accuracy']:.4f}") == 2


def test_a_resume_with_another_teacher_is_refused() -> None:
    begun = ResumePoint(teacher="a" * 64)
    assert check_teacher(begun, "a" * 64, []) is begun
    assert check_teacher(ResumePoint(), "b" * 64, []) == ResumePoint()
    assert check_teacher(begun, None, []) is begun
    with pytest.raises(UsageError) as raised:
        check_teacher(begun, "b" * 64, ["training.seed"])
    assert re.search(rf"teacher are {'b' * 12}, .* {'a' * 12};", str(raised.value))
    other = check_teacher(begun, "b" * 64, ["teacher.path"])
    assert other.other_teacher
    assert other.changes == [f"changed: the weights of the teacher: {'a' * 12} -> {'b' * 12}"]


# Stops the process at its third step.
STOP = """
import os, signal, sys
sys.path.insert(0, {repository!r})
from forge.trainer.loop import LoopTrainer

train_step = LoopTrainer.train_step

def stepping(self, *args):
    if self.state.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    train_step(self, *args)

LoopTrainer.train_step = stepping
from forge.train import main
sys.exit(main())
"""


def test_a_run_goes_on_with_its_own_teacher_or_with_one_that_is_allowed(
    classifier: Path, config_file: Path, tmp_path: Path
) -> None:
    entry, run = tmp_path / "entry.py", tmp_path / "outputs" / "tiny" / "kd"
    entry.write_text(STOP.format(repository=str(REPOSITORY)))
    settings = ["--set", f"teacher.path={classifier}", "--set", "distillation.alpha=0.5"]
    stopped = python(entry, "--config", config_file, "--run_name", "kd", *settings, OMP_NUM_THREADS="1")
    assert stopped.returncode == 75, stopped.stderr
    then = read_json(run / "run_metadata.json")["teacher"]["weights_sha256"]
    other = tmp_path / "other"
    shutil.copytree(classifier, other)
    model = BertForSequenceClassification.from_pretrained(other)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    model.save_pretrained(other)
    shutil.copytree(other, classifier, dirs_exist_ok=True)  # the same place, other weights

    refused = forge("--resume", run, OMP_NUM_THREADS="1")
    assert refused.returncode == 2
    now = hash_of_files([other / "model.safetensors"])
    assert re.search(rf"the weights of the teacher are {now[:12]}, .* {then[:12]};", refused.stderr)
    before = [row for row in read_json_lines(run / "metrics.jsonl") if row.get("stage") == "teacher"]

    allowed = ("--set", f"teacher.path={other}", "--allow-change", "teacher.path")
    done = forge("--resume", run, *allowed, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert f"changed: the weights of the teacher: {then[:12]} -> {now[:12]}" in done.stderr
    (after,) = [row for row in read_json_lines(run / "metrics.jsonl") if row.get("stage") == "teacher"]
    assert after["matched/ce"] != before[0]["matched/ce"]  # it is the new teacher's
    assert "teacher" in done.stdout.splitlines()[2]
