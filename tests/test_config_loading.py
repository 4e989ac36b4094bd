"""A config is its file, its parents and the command line, merged and typed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from forge.config.explain import to_yaml
from forge.config.loader import LoadedConfig, load_config
from forge.config.shipped import find_config
from forge.errors import BaseConfigError, ConfigError

REPO = Path(__file__).resolve().parents[1]
BASES = [REPO / "configs" / "base.yaml"]  # parents only: they name neither task nor model
CONFIGS = [file for file in sorted((REPO / "configs").rglob("*.yaml")) if file not in BASES]

WHOLE = "task: {type: classification, dataset: {path: data}}\nmodel: {path: m}\n"
SCRATCH = """\
task: {type: classification, dataset: {path: data}}
model:
  tokenizer: t
  config:
    model_type: bert
    v: """

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "c.yaml") -> Path:
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    return write


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(REPO)))
def test_every_config_below_configs_is_valid_and_survives_a_round_trip(file: Path, write: Write) -> None:
    loaded = load_config(file)
    assert loaded.notices == []
    assert load_config(write(to_yaml(loaded.config))).config == loaded.config


@pytest.mark.parametrize("file", BASES, ids=lambda file: str(file.relative_to(REPO)))
def test_a_base_says_that_it_is_one(file: Path) -> None:
    with pytest.raises(BaseConfigError) as error:
        load_config(file)
    (problem,) = error.value.problems
    assert problem.endswith(
        "sets neither task nor model, so it is only a base for other configs; inherit it, or set both"
    )


def test_a_base_with_a_mistake_is_not_excused(write: Write) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write("training: {sed: 1}\n"))
    assert not isinstance(error.value, BaseConfigError)
    assert "c.yaml:1: training.sed is not a config key; did you mean training.seed?" in error.value.problems


def test_a_base_and_settings_make_a_whole_config(write: Write) -> None:
    base = write("training: {seed: 7}\n")
    task = "task={type: classification, dataset: {path: data}}"
    assert load_config(base, [task, "model.path=m"]).config.training.seed == 7


def test_maps_merge_key_by_key_and_lists_are_replaced(write: Write) -> None:
    write(WHOLE + "training: {seed: 1, weight_decay: 0.5}\ntracking: {wandb: {tags: [a, b, c]}}\n", "base.yaml")
    config = load_config(write("inherits: base.yaml\ntraining: {seed: 2}\ntracking: {wandb: {tags: [d]}}\n")).config
    assert (config.training.seed, config.training.weight_decay) == (2, 0.5)
    assert config.tracking.wandb is not None
    assert config.tracking.wandb.tags == ["d"]


def test_a_parent_is_relative_to_the_file_that_names_it(write: Write) -> None:
    write("training: {seed: 1}\n", "bases/old.yaml")
    write("inherits: old.yaml\ntraining: {weight_decay: 0.5}\n", "bases/base.yaml")
    file = write("inherits: ../bases/base.yaml\n" + WHOLE, "mine/c.yaml")
    training = load_config(file).config.training
    assert (training.seed, training.weight_decay) == (1, 0.5)


def test_a_setting_beats_the_file_and_a_flag_beats_a_setting(write: Write) -> None:
    file = write(WHOLE + "training: {max_steps: 1}\n")
    assert value(load_config(file), "training.max_steps") == 1
    assert value(load_config(file, ["training.max_steps=2"]), "training.max_steps") == 2
    assert value(load_config(file, ["training.max_steps=2"], max_steps="3"), "training.max_steps") == 3
    assert value(load_config(file, ["training.seed=1", "training.seed=2"]), "training.seed") == 2


def test_debug_is_a_few_rows_two_steps_and_nothing_for_wandb(write: Write) -> None:
    file = write(WHOLE + "training: {epochs: 9}\ntracking: {wandb: {project: p}}\n")
    config = load_config(file, debug=True).config
    assert (config.training.max_steps, config.task.dataset.max_rows, config.evaluation.max_rows) == (2, 64, 16)
    assert (config.logging.every_steps, config.checkpoint.every_steps, config.tracking.wandb) == (1, 1, None)
    assert load_config(file, debug=True, max_steps="5").config.training.max_steps == 5


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.learning_rate=1e-4", 1e-4),  # PyYAML reads a text
        ("training.learning_rate=.5", 0.5),
        ("training.learning_rate=007", 7.0),
        ("training.seed=007", 7),  # PyYAML reads an octal number
        ("training.seed=1_000", 1000),
        ("training.seed=3.0", 3),
        ("training.seed='3'", 3),
        ("training.seed= 3", 3),
        ("training.mixed_precision=no", "no"),  # PyYAML reads false
        ("evaluation.final=no", False),
        ("evaluation.final=ON", True),
        ("output_root=on", "on"),
        ("output_root=007", "007"),
        ("output_root=2026-11-23", "2026-11-23"),
        ("output_root=1e-4", "1e-4"),
        ("output_root='null'", "null"),
        ("output_root=a=b=c", "a=b=c"),
        ("output_root=ausgäbe/试", "ausgäbe/试"),
        ('output_root="a: b"', "a: b"),
        ("model.path=hf:x/y", "hf:x/y"),
        ("training.max_steps=", None),
        ("training.max_steps=null", None),
        ("training.max_grad_norm=~", None),
        ("task.labels=[no, 1, 'on']", ["no", "1", "on"]),
        ("tracking.wandb.project=p", "p"),  # makes the map
        ("model={path: n}", None),
    ],
)
def test_the_type_of_the_field_decides_how_a_text_is_read(setting: str, expected: Any, write: Write) -> None:
    found = value(load_config(write(WHOLE), [setting]), setting.split("=")[0])
    if setting.startswith("model="):
        assert found.path == "n"
    else:
        assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        *(("1e-4", 1e-4), ("'1e-4'", "1e-4"), ("007", 7), ("1_000", 1000), (".5", 0.5), ("3", 3), ("'3'", "3")),
        *(("on", True), ("No", False), ("'on'", "on"), ("inf", "inf"), (".inf", ".inf"), ("nan", "nan")),
        *(("1e400", "1e400"), ("2026-11-23", "2026-11-23"), ("2026-13-45", "2026-13-45"), ("1:30", "1:30")),
        *(("=", "="), ("<<", "<<"), ("0b_", "0b_"), ("null", None), ("''", ""), ("gelu_new", "gelu_new")),
        *(("{}", {}), ("[]", []), ("{0: a, 1: b}", {"0": "a", "1": "b"}), ('"a\\nb"', "a\nb"), ("'~'", "~")),
        ("[1, '1', null, {b: 2, c: ['3', 1e2]}]", [1, "1", None, {"b": 2, "c": ["3", 100.0]}]),
    ],
)
def test_an_open_map_keeps_numbers_and_texts_apart_through_a_round_trip(
    written: str, expected: Any, write: Write
) -> None:
    loaded = load_config(write(f"{SCRATCH}{written}\n"))
    again = load_config(write(to_yaml(loaded.config), "again.yaml"))
    for config in (loaded.config, again.config):
        assert config.model.config == {"model_type": "bert", "v": expected}
        assert type((config.model.config or {})["v"]) is type(expected)


def test_a_setting_reaches_into_an_open_map(write: Write) -> None:
    file = write(SCRATCH + "{a: 1, b: [1, 2]}\n")
    config = load_config(file, ["model.config.v.b=[3]", "model.config.v.c=x"]).config
    assert (config.model.config or {})["v"] == {"a": 1, "b": [3], "c": "x"}


def test_of_alternatives_the_latest_layer_counts(write: Write) -> None:
    write(WHOLE + "training: {epochs: 5}\n", "a.yaml")
    write("inherits: a.yaml\ntraining: {max_steps: 100}\ntask: {dataset: {demo: nli}}\n", "b.yaml")
    steps = load_config(Path("b.yaml"))
    assert (steps.config.training.max_steps, steps.config.task.dataset.path) == (100, None)
    assert ("training", "epochs") not in steps.origins
    epochs = load_config(Path("b.yaml"), epochs="2").config
    assert (epochs.training.max_steps, epochs.training.epochs) == (None, 2.0)
    again = load_config(write("inherits: b.yaml\ntraining: {max_steps: null}\n")).config.training
    assert (again.max_steps, again.epochs) == (None, 5.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\xef\xbb\xbf" + WHOLE.encode(), 42),
        (WHOLE.replace("\n", "\r\n") + "training:\r\n  seed: 1\r\n", 1),
        ("---\n" + WHOLE + "...\n", 42),
        (WHOLE + "training: {max_steps: &n 7, seed: *n}\n", 7),
    ],
    ids=["byte order mark", "carriage returns", "document marks", "alias"],
)
def test_what_editors_and_yaml_allow_is_read(text: str | bytes, expected: int, write: Write) -> None:
    assert load_config(write(text)).config.training.seed == expected


def test_a_config_is_frozen(write: Write) -> None:
    config = load_config(write(WHOLE)).config
    with pytest.raises(ValidationError, match="frozen"):
        config.training.seed = 1


def value(loaded: LoadedConfig, dotted: str) -> Any:
    found: Any = loaded.config
    for key in dotted.split("."):
        found = getattr(found, key)
    return found


def test_a_config_that_comes_with_forge_is_found_by_its_name_and_a_local_one_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("configs/quickstart/sft.yaml")
    loaded = load_config(name)
    assert loaded.file == REPO / name
    assert loaded.config.training.max_steps == 250
    assert str(name) in loaded.notices[0]
    assert str(loaded.file) in loaded.notices[0]
    assert find_config(Path("configs/quickstart/nope.yaml")) == Path("configs/quickstart/nope.yaml")
    assert find_config(Path("quickstart/sft.yaml")) == Path("quickstart/sft.yaml")
    assert find_config(tmp_path / name) == tmp_path / name
    name.parent.mkdir(parents=True)
    name.write_text(WHOLE)
    assert (load_config(name).file, load_config(name).notices) == (name, [])
