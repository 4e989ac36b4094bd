"""A run goes on with a config that differs only in what does no harm, or in what was allowed key by key."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from facts import about

from forge.config.changes import RULES, Change, Kind, allowances, changes, check_changes
from forge.config.explain import effective, to_yaml, with_absolute_paths
from forge.config.hints import all_keys
from forge.config.loader import LoadedConfig, load_config
from forge.errors import ConfigError

WHOLE = """\
task: {type: classification, dataset: {path: data}, columns: {text: a, label: b}, labels: [x, y]}
model: {path: m, dropout: 0.0}
training: {max_steps: 20, batch_size: 64, learning_rate: 5e-5, warmup_ratio: 0.1}
evaluation: {max_rows: 200}
checkpoint: {every_steps: 5}
"""

HARMLESS = {
    "training.max_steps=40": "20 -> 40",
    "training.num_workers=2": "null -> 2",
    "training.gradient_checkpointing=true": "false -> true",
    "training.per_device_batch_size=4": "32 -> 4",
    "evaluation.baseline=false": "true -> false",
    "evaluation.final=false": "true -> false",
    "evaluation.every_steps=3": "null -> 3",
    "evaluation.per_device_batch_size=7": "64 -> 7",
    "checkpoint.every_steps=9": "5 -> 9",
    "checkpoint.keep_last=4": "2 -> 4",
    "logging.every_steps=1": "10 -> 1",
    "tracking.wandb={project: p}":
        "null -> {entity: null, group: null, mode: online, project: p, tags: []}",
    "task.dataset.path=moved": "data -> moved",
}  # fmt: skip
MEANING = {
    "training.learning_rate=1e-4": "5.0e-05 -> 0.0001",
    "training.schedule=cosine": "linear -> cosine",
    "training.warmup_ratio=0.2": "0.1 -> 0.2",
    "training.weight_decay=0": "0.01 -> 0.0",
    "training.adam_beta1=0.8": "0.9 -> 0.8",
    "training.adam_beta2=0.8": "0.999 -> 0.8",
    "training.adam_epsilon=1": "1.0e-08 -> 1.0",
    "training.max_grad_norm=null": "1.0 -> null",
    "training.seed=1": "42 -> 1",
    "training.mixed_precision=bf16": "auto -> bf16",
    "training.length_grouping=false": "true -> false",
    "task.max_length=64": "128 -> 64",
    "task.columns.text=c": "a -> c",
    "task.columns.text_pair=c": "null -> c",
    "task.columns.label=c": "b -> c",
    "task.labels=[y, x]": "[x, y] -> [y, x]",
    "task.dataset.max_rows=5": "null -> 5",
    "task.dataset.train_split=t": "train -> t",
    "task.dataset.validation_splits=[v]": "null -> [v]",
    "model.path=moved": "m -> moved",
    "model.tokenizer=t": "null -> t",
    "model.revision=r": "null -> r",
    "model.labels=[y, x]": "null -> [y, x]",
    "model.new_head=true": "false -> true",
    "model.dropout=0.1": "0.0 -> 0.1",
    "evaluation.max_rows=300": "200 -> 300",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_config_that_is_the_same_has_no_changes() -> None:
    assert found() == []
    Path("again.yaml").write_text(to_yaml(with_absolute_paths(load().config)))  # as a run's own config.yaml
    again = load_config(Path("again.yaml")).config
    assert changes(recorded(load()), again, rows_per_step_old=64, rows_per_step_new=64) == []
    assert check_changes([], []) == []


def test_local_folders_are_the_same_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data", "m"):
        Path(name).mkdir()
    old = recorded(load())
    assert old["model"]["path"] == str(tmp_path / "m")
    assert changes(old, load().config, rows_per_step_old=64, rows_per_step_new=64) == []


@pytest.mark.parametrize("setting", HARMLESS)
def test_a_harmless_change_is_shown_with_its_reason(setting: str) -> None:
    key = setting.split("=")[0]
    shown = next(change for change in found(setting) if change.key == key)
    assert f"{shown.old} -> {shown.new}" == HARMLESS[setting]
    lines = check_changes(found(setting), [])
    assert next(line for line in lines if line.startswith(f"{key}: ")) == f"{key}: {HARMLESS[setting]} ({shown.reason})"


@pytest.mark.parametrize("setting", MEANING)
def test_a_change_of_meaning_is_refused_until_its_key_is_allowed(setting: str) -> None:
    key = setting.split("=")[0]
    refused = [change for change in found(setting) if change.kind is Kind.MEANING]
    assert [change.key for change in refused] == [key]
    (problem,) = problems(found(setting))
    assert problem == (
        about(
            f"{key}: {MEANING[setting]} changes the meaning of the run: {refused[0].reason}; set it back, or add "
            f"--allow-change {key}"
        )
    )
    line = next(line for line in check_changes(found(setting), [key]) if line.startswith(f"{key}: "))
    assert line.startswith(f"{key}: {MEANING[setting]} (allowed by --allow-change, ")


def test_every_key_is_judged_and_every_rule_is_about_a_key() -> None:
    assert {key for key in RULES if key} <= set(all_keys())
    keys = set(all_keys("classification"))
    tried = {setting.split("=")[0] for setting in [*HARMLESS, *MEANING]}
    parts = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    elsewhere = {  # in a test of their own below, or of one possible value
        *("training.epochs", "training.batch_size", "training.gradient_accumulation_steps", "training.warmup_steps"),
        *("task.type", "task.dataset.name", "task.dataset.config", "task.dataset.revision", "task.dataset.demo"),
        "task.dataset.shuffle_buffer",  # of a stream, and so without effect here
        *("model.config", "output_root"),
        *(key for key in keys if key.startswith(("tracking.wandb.", "model.lora.", "model.new_tokenizer."))),
        *(key for key in keys if key.startswith(("teacher.", "distillation.", "training.loss."))),
        "deepspeed.teacher",  # like those no effect here
    }
    new = keys - parts - tried - elsewhere - {"tracking.wandb", "model.lora", "model.new_tokenizer"}
    new -= {"distillation.hidden", "distillation.relations"}
    # A new key changes the meaning until somebody has thought about it.
    harmless = {key for key in new if judged(key) is Kind.HARMLESS}
    assert harmless == {key for key in new if key.startswith(("checkpoint.", "export."))} | {
        *("evaluation.shown_texts", "evaluation.teacher", "evaluation.control", "model.base", "deepspeed.student")
    }


def test_of_how_a_loss_is_computed_the_precision_alone_has_a_meaning() -> None:
    def lm(*settings: str) -> LoadedConfig:
        Path("lm.yaml").write_text("task: {type: causal_lm, dataset: {path: data}}\nmodel: {path: m}\n")
        return load_config(Path("lm.yaml"), settings)

    old = effective(with_absolute_paths(lm().config))
    kinds = {}
    for setting in ("memory_budget_gib=2", "low_memory=true", "precision=bf16"):
        new = lm(f"training.loss.{setting}").config
        (change,) = changes(old, new, rows_per_step_old=32, rows_per_step_new=32)
        kinds[change.key] = change.kind
    assert kinds == {
        "training.loss.memory_budget_gib": Kind.HARMLESS,
        "training.loss.low_memory": Kind.HARMLESS,
        "training.loss.precision": Kind.MEANING,
    }
    del old["training"]["loss"]  # a checkpoint of a forge without the keys
    assert changes(old, lm().config, rows_per_step_old=32, rows_per_step_new=32) == []


def test_every_key_of_the_teacher_changes_the_meaning_but_the_place_of_its_cache() -> None:
    given = ("teacher.path=t", "distillation.alpha=0.5", "distillation.hidden.weight=1")
    old, new = load(*given), load(*given)
    old_tree, keys = recorded(old), set(all_keys("classification"))
    kinds = {}
    for key in sorted(key for key in keys if key.startswith(("teacher.", "distillation."))):
        tree = json.loads(json.dumps(old_tree))
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node[name]
        if not isinstance(node, dict) or leaf not in node or isinstance(node[leaf], dict):
            continue
        node[leaf] = "something else"
        found = changes(tree, new.config, rows_per_step_old=1, rows_per_step_new=1)
        kinds[key] = next(change.kind for change in found if change.key == key)
    assert {"teacher.path", "teacher.dtype", "distillation.alpha", "distillation.hidden.kind"} <= set(kinds)
    assert {key for key, kind in kinds.items() if kind is Kind.HARMLESS} <= {"teacher.cache"}


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("replicated", "offload", Kind.HARMLESS),
        ("offload", "replicated", Kind.HARMLESS),
        ("replicated", "cached", Kind.MEANING),
        ("cached", "offload", Kind.MEANING),
    ],
)
def test_a_teacher_may_move_to_the_host_and_back_but_not_into_a_cache(old: str, new: str, kind: Kind) -> None:
    given = ("teacher.path=t", "distillation.alpha=0.5")
    before, after = (load(*given, f"teacher.placement={placement}") for placement in (old, new))
    (change,) = (change for change in judge(before, after) if change.key == "teacher.placement")
    assert change.kind is kind


def test_all_problems_are_told_at_once_and_an_allowed_key_allows_no_other() -> None:
    several = found("training.seed=1", "training.learning_rate=1", "logging.every_steps=1", "task.max_length=9")
    assert [problem.split(":")[0] for problem in problems(several, "training.seed")] == [
        "task.max_length", "training.learning_rate",
    ]  # fmt: skip
    lines = check_changes(several, ["training.seed", "training.learning_rate", "task.max_length"])
    assert [line.split(":")[0] for line in lines] == [
        "task.max_length", "training.learning_rate", "training.seed", "logging.every_steps",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ("training", "is a section, not a key; name each key: --allow-change training.seed"),
        ("evaluation", "is a section, not a key, and none of its keys changes; remove it"),
        ("training.learning_rate", "the key does not change; remove it"),
        ("training.learning_rat", "is not a config key; did you mean training.learning_rate?"),
        ("lr", "is not a config key; did you mean training.learning_rate?"),
        ("model.config.layers", "the key does not change; remove it"),
    ],
)
def test_an_allowance_of_nothing_is_an_error(allowed: str, expected: str) -> None:
    assert problems(found("training.seed=1"), allowed, "training.seed") == about(
        [f"--allow-change {allowed}: {expected}"]
    )
    assert len(problems(found("training.seed=1"), allowed)) == 2  # and the refused change itself


def test_the_allowance_of_other_rows_is_left_to_whoever_loads_them() -> None:
    assert check_changes([], ["task.dataset"]) == []
    assert len(problems(found("task.dataset.max_rows=5"), "task.dataset")) == 1  # it allows no key


def test_an_allowance_holds_for_its_value_in_later_attempts() -> None:
    """The attempt that it was given to may have been killed before it saved a checkpoint with the new value."""
    first = found("training.seed=1", "training.max_steps=40")
    before = allowances(first)
    assert before == {"training.seed": "1"}
    length, seed = check_changes(first, [], before)
    assert length.startswith("training.max_steps: 20 -> 40 (")
    assert seed.startswith("training.seed: 42 -> 1 (allowed in an earlier attempt, ")
    (other,) = problems(found("training.seed=2"), before=before)
    assert other.startswith("training.seed: 42 -> 2 changes the meaning of the run: ")
    # The same command once more, after a checkpoint has the new value.
    assert check_changes([], ["training.seed"], before) == []
    assert problems([], "training.weight_decay", before=before) == about(
        ["--allow-change training.weight_decay: the key does not change; remove it"]
    )


def test_a_harmless_change_may_be_allowed_and_a_key_named_twice() -> None:
    assert len(check_changes(found("training.max_steps=40"), ["training.max_steps"])) == 1
    assert len(check_changes(found("training.seed=4"), ["training.seed", "training.seed"])) == 1


class TestTheRowsOfAStep:
    def test_may_be_spread_otherwise(self) -> None:
        spread = found("training.per_device_batch_size=4")
        assert [(change.key, change.kind) for change in spread] == [
            ("training.per_device_batch_size", Kind.HARMLESS),
        ]
        settings = ("training.gradient_accumulation_steps=2", "training.per_device_batch_size=32")
        assert {(str(change), change.kind) for change in found(*settings)} == {
            ("training.batch_size: 64 -> null", Kind.HARMLESS),
            ("training.gradient_accumulation_steps: (no effect) -> 2", Kind.HARMLESS),
        }

    def test_may_not_be_more_or_fewer(self) -> None:
        other = found("training.batch_size=128", rows_old=64, rows_new=128)
        (problem,) = problems(other)
        assert problem == (
            about(
                "training.batch_size: 64 rows per step -> 128 rows per step changes the meaning of the run: a step "
                "would have 128 rows instead of 64, and each row another place in the epoch; keep the size with "
                "`--set training.batch_size=64`; set it back, or add --allow-change training.batch_size"
            )
        )
        assert len(check_changes(other, ["training.batch_size"])) == 1

    def test_may_not_follow_the_number_of_ranks(self) -> None:
        """The config is the same, but without training.batch_size a step grows with the ranks."""
        (change,) = found(rows_old=64, rows_new=128)
        assert (change.key, change.kind) == ("training.batch_size", Kind.MEANING)

    def test_are_refused_beside_the_key_that_changed_them(self) -> None:
        more = found("training.gradient_accumulation_steps=2", rows_old=128, rows_new=64)
        assert {(change.key, change.kind) for change in more} == {
            ("training.gradient_accumulation_steps", Kind.HARMLESS),
            ("training.batch_size", Kind.MEANING),
        }


class TestAnAlternative:
    def test_of_length_replaces_the_other(self) -> None:
        for given in (load(epochs="2"), load("training.epochs=2")):
            assert (given.config.training.max_steps, given.config.training.epochs) == (None, 2)
            assert given.notices == []
            assert [str(change) for change in judge(load(), given)] == [
                "training.epochs: (no effect) -> 2.0", "training.max_steps: 20 -> null",
            ]  # fmt: skip
            assert len(check_changes(judge(load(), given), [])) == 2
        back = judge(load("training.epochs=2"), load())
        assert [str(change) for change in back] == [
            "training.epochs: 2.0 -> (no effect)", "training.max_steps: null -> 20",
        ]  # fmt: skip

    def test_length_that_falls_back_to_its_default_is_shown(self) -> None:
        """`--set training.max_steps=null` must not start three epochs without a word."""
        assert [str(change) for change in judge(load(), load("training.max_steps=null"))] == [
            "training.epochs: (no effect) -> 3.0", "training.max_steps: 20 -> null",
        ]  # fmt: skip

    def test_of_warm_up_needs_the_allowance_of_what_was_set(self) -> None:
        more = judge(load(), load("training.warmup_steps=10"))
        assert [problem.split(" changes")[0] for problem in problems(more)] == ["training.warmup_steps: null -> 10"]
        assert check_changes(more, ["training.warmup_steps"])[0] == (
            "training.warmup_ratio: 0.1 -> (no effect) (because training.warmup_steps is set)"
        )

    def test_place_of_the_data_is_left_to_the_fingerprint(self) -> None:
        hub = WHOLE.replace("{path: data}", "{name: glue, config: mnli, revision: r}")
        lines = check_changes(judge(load(text=hub), load()), [])
        assert [line.split(" (because")[0] for line in lines if "because" in line] == [
            "task.dataset.name: glue -> (no effect)",
            "task.dataset.config: mnli -> (no effect)",
            "task.dataset.revision: r -> (no effect)",
        ]
        assert [p.split(" changes")[0] for p in problems(judge(load(), load(text=hub)))] == [
            "task.dataset.name: (no effect) -> glue",
            "task.dataset.config: (no effect) -> mnli",
            "task.dataset.revision: (no effect) -> r",
        ]
        demo = WHOLE.replace("{path: data}", "{demo: nli}")
        assert [p.split(" changes")[0] for p in problems(judge(load(text=demo), load()))] == [
            "task.dataset.demo: nli -> null",
        ]

    def test_model_that_is_built_from_scratch_is_another_model(self) -> None:
        scratch = WHOLE.replace("path: m, dropout", "tokenizer: t, config: {model_type: bert, layers: 2}, dropout")
        assert [p.split(" changes")[0] for p in problems(judge(load(), load(text=scratch)))] == [
            "model.config: null -> {layers: 2, model_type: bert}", "model.tokenizer: null -> t",
        ]  # fmt: skip
        deeper = judge(load(text=scratch), load("model.config.layers=3", text=scratch))
        assert [str(change) for change in deeper] == ["model.config.layers: 2 -> 3"]
        assert len(check_changes(deeper, ["model.config.layers"])) == 1
        assert problems(deeper, "model.config.layers", "model.config.heads") == about(
            ["--allow-change model.config.heads: the key does not change; remove it"]
        )


def test_a_key_that_comes_into_effect_with_its_default_needs_no_allowance() -> None:
    off = "evaluation: {baseline: false, final: false}"
    text = WHOLE.replace("evaluation: {max_rows: 200}", off)
    on = judge(load(text=text), load("evaluation.final=true", text=text))
    assert [(str(change), change.kind) for change in on] == [
        ("evaluation.final: false -> true", Kind.HARMLESS),
        ("evaluation.max_rows: (no effect) -> null", Kind.HARMLESS),
        ("evaluation.per_device_batch_size: (no effect) -> 64", Kind.HARMLESS),
    ]
    sampled = judge(load(text=text), load("evaluation.final=true", "evaluation.max_rows=5", text=text))
    assert len(problems(sampled)) == 1


def test_tracking_is_compared_key_by_key() -> None:
    text = WHOLE + "tracking: {wandb: {project: p}}\n"
    assert [str(change) for change in judge(load(text=text), load("tracking.wandb.project=q", text=text))] == [
        "tracking.wandb.project: p -> q"
    ]
    (off,) = judge(load(text=text), load("tracking.wandb=null", text=text))
    assert (off.key, off.new, off.kind) == ("tracking.wandb", "null", Kind.HARMLESS)


def test_a_new_output_root_is_harmless(tmp_path: Path) -> None:
    (moved,) = judge(load(), load(output_root="other"))
    assert (str(moved), moved.kind) == (f"output_root: {tmp_path}/outputs -> {tmp_path}/other", Kind.HARMLESS)


class TestAnotherForge:
    def test_without_a_key_did_what_its_default_does(self) -> None:
        old = recorded(load())
        del old["training"]["length_grouping"], old["checkpoint"]["keep_last"], old["logging"]
        assert changes(old, load().config, rows_per_step_old=1, rows_per_step_new=1) == []
        new = load("training.length_grouping=false", "checkpoint.keep_last=5").config
        more = changes(old, new, rows_per_step_old=1, rows_per_step_new=1)
        assert [(str(change), change.kind) for change in more] == [
            ("training.length_grouping: (unknown to the version that saved it) -> false", Kind.MEANING),
            ("checkpoint.keep_last: (unknown to the version that saved it) -> 5", Kind.HARMLESS),
        ]  # fmt: skip

    def test_with_a_key_of_its_own_is_judged_by_where_it_stands(self) -> None:
        old = recorded(load())
        old["training"]["label_smoothing"] = 0.1
        old["logging"]["colour"] = "red"
        old["rl"] = {"rewards": ["length"]}
        newer = changes(old, load().config, rows_per_step_old=1, rows_per_step_new=1)
        assert {(str(change), change.kind) for change in newer} == {
            ("training.label_smoothing: 0.1 -> (unknown to this version)", Kind.MEANING),
            ("logging.colour: red -> (unknown to this version)", Kind.HARMLESS),
            ("rl.rewards: [length] -> (unknown to this version)", Kind.MEANING),
        }
        assert len(check_changes(newer, ["training.label_smoothing", "rl.rewards"])) == 3

    def test_with_values_that_this_one_does_not_take_is_still_read(self) -> None:
        old = recorded(load())
        old["training"]["schedule"] = "wave"
        old["training"]["rho"] = 1
        more = changes(old, load("training.epochs=1").config, rows_per_step_old=1, rows_per_step_new=1)
        # What it does take was understood: that the epochs had no effect.
        assert "training.epochs: (no effect) -> 1.0" in [str(change) for change in more]
        old["task"]["dataset"] = {"stream": "s3"}
        more = changes(old, load("training.epochs=1").config, rows_per_step_old=1, rows_per_step_new=1)
        assert {change.key for change in more} >= {
            "training.schedule", "training.rho", "task.dataset.stream", "training.max_steps", "training.epochs",
        }  # fmt: skip
        assert "training.schedule: wave -> linear" in [str(change) for change in more]


@pytest.mark.parametrize(
    "overrides",
    [
        {"settings": ["training.epochs=2"]},
        {"settings": ["training.max_steps=9"]},
        {"epochs": "2"},
        {"max_steps": "9"},
        {"settings": ["training.gradient_accumulation_steps=2"]},
        {"settings": ["training.warmup_steps=3"]},
        {"settings": ["training.seed=1", "task.dataset.path=elsewhere"], "max_steps": "9"},
    ],
)
def test_overrides_of_a_runs_own_config_take_the_place_of_what_it_says(overrides: dict[str, Any]) -> None:
    """No override of an alternative is called without effect, or given twice."""
    Path("config.yaml").write_text(to_yaml(with_absolute_paths(load().config)))
    loaded = load_config(Path("config.yaml"), overrides.pop("settings", ()), **overrides)
    assert loaded.notices == []
    assert yaml.safe_load(to_yaml(loaded.config)) == effective(loaded.config)


def load(*settings: str, text: str = WHOLE, **flags: str) -> LoadedConfig:
    Path("c.yaml").write_text(text)
    return load_config(Path("c.yaml"), settings, **flags)


def recorded(loaded: LoadedConfig) -> dict[str, Any]:
    """As a manifest has it: through JSON."""
    return json.loads(json.dumps(effective(with_absolute_paths(loaded.config))))


def judge(old: LoadedConfig, new: LoadedConfig, rows_old: int = 64, rows_new: int = 64) -> list[Change]:
    return changes(recorded(old), new.config, rows_per_step_old=rows_old, rows_per_step_new=rows_new)


def found(*settings: str, rows_old: int = 64, rows_new: int = 64) -> list[Change]:
    return judge(load(), load(*settings), rows_old, rows_new)


def problems(more: list[Change], *allowed: str, before: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_changes(more, allowed, before or {})
    return caught.value.problems


def judged(key: str) -> Kind:
    old, new = recorded(load()), load().config
    *parents, leaf = key.split(".")
    node = old
    for name in parents:
        node = node[name]
    node[leaf] = "something else"
    return next(c for c in changes(old, new, rows_per_step_old=1, rows_per_step_new=1) if c.key == key).kind
