"""What the tests share: a tiny model and tokenizer, a small data folder, the true commands, and a trainer."""

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm

# Imports make millions of objects, none of them garbage: a seventh of the time of a collection of tests.
gc.set_threshold(100_000, 20, 100)
# Before any import of a library that reads them: tests never reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).resolve().parents[1]
NOUNS = ["dog", "cat", "man", "girl", "bird", "horse", "cook", "boat"]
VERBS = ["sees", "likes", "draws", "finds"]
WORDS = ["the", "a", "no", "not", *NOUNS, *VERBS]


SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")
SLOW_S = 0.5
SLOW_FIXTURES = {"outputs", "runs", "finished", "recorded", "installed_forge", "warm_starts"}  # they train
_seconds: dict[str, float] = {}  # by test function; the longest setup or call of its cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-slow", action="store_true", help=f"update {SLOW_TESTS.name} from this run of all tests")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what took more than half a second when it was last recorded, and what shares a run's time."""
    slow = set(SLOW_TESTS.read_text().split())
    for item in items:
        if _function_of(item.nodeid) in slow or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _function_of(report.nodeid)
    _seconds[name] = max(_seconds.get(name, 0.0), report.duration)


def _function_of(nodeid: str) -> str:
    return nodeid.removeprefix("tests/").split("[")[0]


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collection, which every training asks for at its end: 0.3 s each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # else a library reports at the end that it leaks
    if session.config.getoption("--record-slow") and not hasattr(session.config, "workerinput"):
        SLOW_TESTS.write_text("".join(f"{name}\n" for name in sorted(_seconds) if _seconds[name] > SLOW_S))


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of two layers without a classification head, and its word-level tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers and its chat tokenizer."""
    from conversations import write_chat_model

    return write_chat_model(tmp_path_factory.mktemp("chat_model"))


@pytest.fixture
def load_lm(tmp_path: Path, chat_model: Path) -> Callable[..., object]:
    """Loads the causal LM task on the given rows: load_lm(train, validation, "task.max_length=32", …)."""
    from conversations import config_on

    from forge.task.causal_lm.task import load_causal_lm

    return lambda train, validation, *settings: load_causal_lm(
        config_on(tmp_path, chat_model, train, validation, *settings)
    )


def write_tiny_model(folder: Path) -> Path:
    """The tiny model, also for programs that are no test."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def pair_rows(count: int, offset: int = 0) -> list[dict[str, object]]:
    """Sentence pairs of several lengths; the label follows from the hypothesis' first word."""
    rows: list[dict[str, object]] = []
    for i in range(offset, offset + count):
        noun, other, verb = NOUNS[i % 8], NOUNS[(i // 8) % 8], VERBS[i % 4]
        premise = " ".join(["the", noun, verb, "the", other] * (1 + i % 3))
        label = i % 3
        rows.append({"premise": premise, "hypothesis": f"{('a', 'the', 'no')[label]} {noun} {verb}", "label": label})
    return rows


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training pairs and two validation splits of 13 and 7 rows."""
    return write_data_folder(tmp_path_factory.mktemp("data"))


def write_data_folder(folder: Path) -> Path:
    write_rows(folder / "train.jsonl", pair_rows(48))
    write_rows(folder / "validation_matched.jsonl", pair_rows(13, offset=100))
    write_rows(folder / "validation_other.jsonl", pair_rows(7, offset=200))
    return folder


@pytest.fixture
def config_file(tmp_path: Path, tiny_model: Path, data_folder: Path) -> Path:
    """A config for the tiny model on the small data, without dropout, in steps of eight rows.

    The large epsilon keeps AdamW from blowing up rounding: with the usual one, a weight whose true gradient is 0
    (a key bias) moves by the full rate in the direction of its rounding error.
    """
    file = tmp_path / "tiny.yaml"
    file.write_text(f"""
task:
  type: classification
  dataset: {{path: {data_folder}}}
  columns: {{text: premise, text_pair: hypothesis, label: label}}
  labels: [entailment, neutral, contradiction]
  max_length: 32
model: {{path: {tiny_model}, dropout: 0.0}}
training: {{max_steps: 6, batch_size: 8, learning_rate: 3e-3, adam_epsilon: 1e-3, mixed_precision: no}}
logging: {{every_steps: 1}}
checkpoint: {{every_steps: 3}}
output_root: {tmp_path / "outputs"}
""")
    return file


@pytest.fixture
def warm_starts() -> Iterator[None]:
    """Within the test, whatever it starts of this interpreter by subprocess is a fork of a warm one (see warm.py)."""
    with warm.starts():
        yield


def forge(
    *arguments: object, cwd: Path = REPOSITORY, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The true command, `python forge.py …`, to its end. fresh: in an interpreter that does its own imports."""
    return python(REPOSITORY / "forge.py", *arguments, cwd=cwd, fresh=fresh, **environment)


def python(
    *arguments: object, cwd: Path = REPOSITORY, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script, or -m with a module, to its end."""
    return _ended([sys.executable, *map(str, arguments)], cwd, environment, fresh)


def _ended(command: list[str], cwd: Path, environment: dict[str, str], fresh: bool) -> subprocess.CompletedProcess[str]:
    with warm.starts(fresh):
        return subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


def two_ranks_command(*arguments: object, script: object = "forge/train.py") -> list[str]:
    """Two gloo ranks through accelerate's launcher and a free port, uninstalled."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", str(port)]
    return [*command, "--mixed_precision", "no", "--dynamo_backend", "no", str(script), *map(str, arguments)]


TWO_RANKS_ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def forge_on_two_ranks(
    *arguments: object, script: object = "forge/train.py", fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The true command on two ranks, which the true launcher starts, to its end."""
    command = two_ranks_command(*arguments, script=script)
    return _ended(command, REPOSITORY, {**TWO_RANKS_ENVIRONMENT, **environment}, fresh)


def trainer_of(config: Any, folder: Path, mutate: Callable[[object], None] | None = None) -> Any:
    """The trainer of a config in this process, with its run in the folder; mutate: what becomes of the student."""
    from accelerate.state import AcceleratorState, GradientState

    from forge.attempt.attempt import Attempt
    from forge.attempt.callbacks.callback import Callback
    from forge.attempt.components import load_components
    from forge.attempt.request import Request
    from forge.cluster.signals import StopRequest
    from forge.config.loader import LoadedConfig
    from forge.ranks.world import join_ranks
    from forge.run.directory import create_run_directory
    from forge.run.lock import RunLock
    from forge.run.state import TrainingState, new_run_id
    from forge.trainer.build import build_trainer

    class Recorder(Callback):
        def __init__(self) -> None:
            self.reports: list[dict[str, float]] = []
            self.evaluations: list[tuple[str, int]] = []
            self.saves: list[tuple[int, dict[str, object]]] = []

        def reported(self, state: TrainingState, metrics: dict[str, float]) -> None:
            self.reports.append(metrics)

        def evaluated(self, state: TrainingState, stage: str, metrics: dict[str, float]) -> None:
            self.evaluations.append((stage, state.step))

        def saved(self, state: TrainingState, facts: dict[str, object]) -> None:
            self.saves.append((state.step, facts))

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    ranks = join_ranks(config, StopRequest())
    attempt = Attempt(Request(LoadedConfig(config, Path("c.yaml"), {}, []), []), ranks)
    components = load_components(attempt.loaded, ranks, [])
    if mutate is not None:
        mutate(components.student.model)
    attempt.check(components)
    attempt.run = create_run_directory(folder / "trainer_runs", Path("tiny"), None)
    attempt.state = TrainingState(run_id=new_run_id())
    attempt._lock = RunLock(attempt.run)
    attempt._lock.take()
    attempt.callbacks = Recorder()
    return build_trainer(components, attempt)


@pytest.fixture
def build_trainer(config_file: Path, tmp_path: Path) -> Iterator[Callable[..., object]]:
    """Builds the config's trainer in this process, with its teacher: build_trainer("training.seed=1", …)."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from forge.config.loader import load_config

    def build(*settings: str, mutate: Callable[[object], None] | None = None) -> object:
        return trainer_of(load_config(config_file, settings).config, tmp_path, mutate)

    yield build
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
