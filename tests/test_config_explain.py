"""A config is shown with the origin of each key, compared with another, and described for editors."""

import json
from pathlib import Path

import pytest
import yaml

from forge.config.explain import config_name, difference, effective, json_schema, show, to_yaml
from forge.config.hints import OTHER_NAMES, all_keys
from forge.config.loader import LoadedConfig, load_config

WHOLE = "task: {type: classification, dataset: {path: data}}\nmodel: {path: m}\n"  # two lines
SCRATCH = WHOLE.replace(
    "path: m", "tokenizer: t, config: {model_type: bert, id2label: {0: no}, sizes: [1, 2], s: '1e3'}"
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_kind_of_override_has_its_origin() -> None:
    Path("base.yaml").write_text(
        "training:\n  seed: 1\n  epochs: 5\n  weight_decay: 0.5\ntracking:\n  wandb:\n    tags: [a, b]\n"
    )
    text = "inherits: base.yaml\n" + WHOLE + "training:\n  seed: 2\ntracking:\n  wandb:\n    tags:\n      - c\n"
    loaded = load(text, "training.weight_decay=0.1", "logging={every_steps: 3}", max_steps="7", debug=True)
    assert origins(loaded, "task.type", "task.dataset.path", "task.max_length") == ["c.yaml:2", "c.yaml:2", "default"]
    assert origins(loaded, "training.seed", "training.weight_decay") == ["c.yaml:5", "--set training.weight_decay=0.1"]
    assert origins(loaded, "training.max_steps", "training.epochs") == ["--max_steps", "default"]
    assert origins(loaded, "logging.every_steps", "tracking.wandb") == ["--debug", "--debug"]
    assert origins(load(text), "tracking.wandb.tags", "tracking.wandb.tags.0") == ["c.yaml:8", "c.yaml:9"]
    assert origins(load(text), "tracking.wandb.tags.1", "training.epochs") == ["default", "base.yaml:3"]
    assert (
        origins(load(text, "tracking.wandb.tags=[d, e]"), "tracking.wandb.tags", "tracking.wandb.tags.1")
        == ["--set tracking.wandb.tags=[d, e]"] * 2
    )
    again = load(text, "training={seed: 3}")
    assert origins(again, "training.seed", "training.weight_decay") == ["--set training={seed: 3}", "base.yaml:4"]


def test_a_section_set_to_null_and_filled_again_keeps_no_old_origin() -> None:
    text = WHOLE + "tracking:\n  wandb:\n    project: p\n    group: g\n"
    loaded = load(text, "tracking.wandb=null", "tracking.wandb.mode=offline")
    assert origins(loaded, "tracking.wandb.mode", "tracking.wandb.project", "tracking.wandb.group") == [
        "--set tracking.wandb.mode=offline",
        "default",
        "default",
    ]
    assert loaded.config.tracking.wandb is not None
    assert (loaded.config.tracking.wandb.project, loaded.config.tracking.wandb.group) == ("forge", None)


def test_a_config_is_shown_with_its_origins() -> None:
    shown = show(load(SCRATCH, "output_root=ausgäbe", 'tracking={wandb: {group:\n "a\\nb"}}'), origin=True)
    lines = dict(line.split("  # ") for line in shown.splitlines() if "  # " in line)
    assert {key.rstrip(): origin for key, origin in lines.items()}.items() >= {
        "  max_length: 128": "default",
        "    path: data": "c.yaml:1",
        "    model_type: bert": "c.yaml:2",
        "      '0': false": "c.yaml:2",
        "    sizes: [1, 2]": "c.yaml:2",
        "    s: '1e3'": "c.yaml:2",
        "  adam_epsilon: 1.0e-08": "default",
        "  mixed_precision: auto": "default",
        "output_root: ausgäbe": "--set output_root=ausgäbe",
        '    group: "a\\nb"': '--set tracking={wandb: {group:  "a\\nb"}}',
    }.items()
    assert len({line.index("# ") for line in shown.splitlines() if "# " in line}) == 1  # one column


def test_both_ways_to_show_a_config_are_that_config() -> None:
    loaded = load(SCRATCH, "tracking={wandb: {tags: [on, '3', ~x], project: 'null'}}")
    for text in (show(loaded, origin=True), show(loaded, origin=False), to_yaml(loaded.config)):
        Path("again.yaml").write_text(text)
        assert load_config(Path("again.yaml")).config == loaded.config


def test_keys_without_effect_are_not_written() -> None:
    written = yaml.safe_load(to_yaml(load(WHOLE + "training: {max_steps: 3}\n").config))
    assert "epochs" not in written["training"]
    assert written["distillation"] == {"alpha": 0.0}
    assert "teacher" not in written
    assert written == effective(load(WHOLE + "training: {max_steps: 3}\n").config)


def test_a_difference_is_one_line_for_each_key() -> None:
    left = load(WHOLE + "training: {seed: 1}\n").config
    assert difference(left, left) == []
    right = load(SCRATCH + "training: {seed: 1, max_steps: 5, learning_rate: 1e-4}\n").config
    assert difference(left, right) == [
        "model.path: m -> (no effect)",
        "model.revision: null -> (no effect)",
        "model.config: null -> (not set)",
        "model.tokenizer: null -> t",
        "model.base: null -> (no effect)",
        "model.adapter: null -> (no effect)",
        "model.keep_layers: null -> (no effect)",
        "model.labels: null -> (no effect)",
        "model.new_head: false -> (no effect)",
        "training.epochs: 3.0 -> (no effect)",
        "training.max_steps: null -> 5",
        "training.learning_rate: 5.0e-05 -> 0.0001",
        "model.config.model_type: (not set) -> bert",
        "model.config.id2label.0: (not set) -> false",
        "model.config.sizes: (not set) -> [1, 2]",
        "model.config.s: (not set) -> '1e3'",
    ]


def test_the_schema_describes_every_key_and_requires_none() -> None:
    schema = json.loads(json_schema())
    assert list(schema["properties"])[:3] == ["inherits", "task", "model"]
    sections = [schema, *schema["$defs"].values()]
    bare = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if not ({"description", "$ref"} & set(field) or any("$ref" in option for option in field.get("anyOf", [])))
    ]
    assert bare == []
    assert all(section["description"] for section in sections)
    assert all(section["additionalProperties"] is False for section in sections)
    assert not any(section.get("required") for section in sections)
    assert schema["$defs"]["TrainingConfig"]["properties"]["schedule"]["enum"] == ["linear", "cosine", "constant"]


def test_every_other_name_leads_to_a_key() -> None:
    assert set(OTHER_NAMES.values()) <= set(all_keys())
    assert not set(OTHER_NAMES) & {"seed", "epochs", "path"}


def load(text: str, *settings: str, debug: bool = False, max_steps: str | None = None) -> LoadedConfig:
    Path("c.yaml").write_text(text)
    return load_config(Path("c.yaml"), settings, debug=debug, max_steps=max_steps)


def origins(loaded: LoadedConfig, *keys: str) -> list[str]:
    return [str(loaded.origins.get(tuple(key.split(".")), "default")) for key in keys]


def test_the_schema_takes_what_forge_reads() -> None:
    """Editors see `no` as false, a label 0 as a number, and `1e-4` as text, and a parent may leave out task.type."""
    schema = json.loads(json_schema())
    assert "oneOf" not in json_schema()
    keys = {name: section["properties"] for name, section in schema["$defs"].items()}
    assert False in keys["TrainingConfig"]["mixed_precision"]["enum"]
    assert keys["TrainingConfig"]["compile"]["type"] == ["boolean", "string"]
    assert keys["TrainingConfig"]["learning_rate"]["type"] == ["number", "string"]
    assert keys["TrainingConfig"]["learning_rate"]["exclusiveMinimum"] == 0
    assert keys["LoraConfig"]["target"]["type"] == ["array", "string"]
    assert keys["ModelConfig"]["labels"]["anyOf"][0]["items"]["type"] == ["string", "number", "boolean"]


def test_the_config_of_a_run_stands_for_the_file_that_it_was_started_from(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "a" / "sft" / "r"
    run.mkdir(parents=True)
    assert config_name(run / "config.yaml") == Path("config")
    (run / "training_state.json").write_text("{}")
    (run / "run_metadata.json").write_text('{"config_file": "/here/configs/a/sft.yaml"}')
    assert config_name(run / "config.yaml") == Path("a/sft")
    (run / "run_metadata.json").write_text("[")
    assert config_name(run / "config.yaml") == Path("config")
