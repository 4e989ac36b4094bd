"""A key without effect is a mistake where one author wrote it and the mode, a notice where two did."""

from pathlib import Path

import pytest
from facts import about, tells

from forge.config.effects import inert_keys, unsupported
from forge.config.explain import effective
from forge.config.loader import LoadedConfig, load_config
from forge.config.schema import Config, LossConfig
from forge.config.teacher_schema import DistillationConfig, TeacherConfig
from forge.errors import ConfigError

WHOLE = "task: {type: classification, dataset: {path: data}}\nmodel: {path: m}\n"  # two lines
ALPHA_0 = "distillation: {alpha: 0}\n"
WITH_EVALUATIONS = {"(evaluation.every_steps is set)"}
HOT = "distillation: {temperature: 4}\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_file_that_sets_both_is_wrong() -> None:
    assert problems(WHOLE + "distillation:\n  temperature: 4\n  alpha: 0\n") == about(
        [
            "c.yaml:4: distillation.temperature has no effect because distillation.alpha is 0 (c.yaml:5); "
            "take one of them out"
        ]
    )


def test_a_command_line_that_sets_both_is_wrong() -> None:
    assert problems(WHOLE, "distillation.alpha=0", "distillation.temperature=4") == about(
        [
            "--set distillation.temperature=4: distillation.temperature has no effect because distillation.alpha is 0 "
            "(--set distillation.alpha=0); remove one of them"
        ]
    )


def test_a_parent_that_sets_both_is_wrong_for_its_heirs_too() -> None:
    Path("b.yaml").write_text("distillation: {alpha: 0, temperature: 4}\n")
    assert problems("inherits: b.yaml\n" + WHOLE) == about(
        [
            "b.yaml:1: distillation.temperature has no effect because distillation.alpha is 0 (b.yaml:1); "
            "take one of them out [inherited by c.yaml]"
        ]
    )


def test_a_control_run_of_a_distillation_is_one_notice() -> None:
    loaded = load(WHOLE + "distillation:\n  temperature: 4\nteacher: {path: t}\n", "distillation.alpha=0")
    assert loaded.notices == about(
        [
            "without effect in this run: distillation.temperature (c.yaml:4: distillation.alpha is 0), "
            "teacher.path (c.yaml:5: distillation.alpha is 0)"
        ]
    )


def test_a_new_tokenizer_of_a_config_is_left_where_the_command_line_names_a_model() -> None:
    text = WHOLE.replace("path: m", "config: {model_type: bert}, new_tokenizer: {kind: characters}")
    loaded = load(text, "model.path=m")
    assert loaded.config.model.config is None
    assert loaded.notices == about(["without effect in this run: model.new_tokenizer (c.yaml:2: model.path is set)"])


@pytest.mark.parametrize(("parent", "child"), [(ALPHA_0, HOT), (HOT, ALPHA_0)])
def test_a_parent_and_its_child_are_two_authors(parent: str, child: str) -> None:
    Path("b.yaml").write_text(parent)
    place = "b.yaml:1" if parent == HOT else "c.yaml:4"
    assert load(f"inherits: b.yaml\n{WHOLE}{child}").notices == about(
        [f"without effect in this run: distillation.temperature ({place}: distillation.alpha is 0)"]
    )


def test_a_file_and_the_command_line_are_two_authors() -> None:
    assert load(WHOLE + ALPHA_0, "distillation.temperature=4").notices == about(
        [
            "without effect in this run: distillation.temperature "
            "(--set distillation.temperature=4: distillation.alpha is 0)"
        ]
    )


def test_a_mode_that_nobody_set_makes_a_notice() -> None:
    assert load(WHOLE + HOT).notices == about(
        ["without effect in this run: distillation.temperature (c.yaml:3: distillation.alpha is 0)"]
    )


def test_a_default_and_a_null_are_not_spoken_of() -> None:
    assert load(WHOLE + ALPHA_0).notices == []
    assert load(WHOLE + "distillation: {alpha: 0}\nteacher: {path: null}\n").notices == []
    assert load(WHOLE.replace("path: data", "path: data, name: null")).notices == []


def test_a_value_that_the_last_author_set_again_is_his() -> None:
    Path("b.yaml").write_text(HOT)
    (problem,) = problems(f"inherits: b.yaml\n{WHOLE}distillation: {{alpha: 0, temperature: 3}}\n")
    assert problem.startswith("c.yaml:4: distillation.temperature has no effect")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WHOLE, {"task.dataset.name", "task.dataset.config", "task.dataset.revision"}),
        (WHOLE.replace("path: data", "name: n"), set()),
        (
            WHOLE.replace("path: data", "demo: nli"),
            {
                *("task.dataset.name", "task.dataset.config", "task.dataset.revision"),
                *("task.dataset.train_split", "task.dataset.validation_splits"),
            },
        ),
        (
            WHOLE.replace("path: data", "name: n").replace("path: m", "config: {model_type: bert}, tokenizer: t"),
            {f"model.{key}" for key in ("path", "revision", "base", "adapter", "keep_layers", "labels", "new_head")},
        ),
        (WHOLE.replace("path: data", "name: n").replace("path: m", "path: m, new_head: yes"), {"model.labels"}),
        (WHOLE.replace("path: data", "name: n") + "training: {max_steps: 1}\n", {"training.epochs"}),
        (WHOLE.replace("path: data", "name: n") + "training: {warmup_steps: 0}\n", {"training.warmup_ratio"}),
        (
            WHOLE.replace("path: data", "name: n") + "training: {batch_size: 8}\n",
            {"training.gradient_accumulation_steps"},
        ),
        (
            WHOLE.replace("path: data", "name: n") + "evaluation: {baseline: no, final: no, every_steps: 3}\n",
            WITH_EVALUATIONS,
        ),
        (
            WHOLE.replace("path: data", "name: n") + "evaluation: {every_steps: 3}\ncheckpoint: {keep_best: no}\n",
            WITH_EVALUATIONS | {"checkpoint.best_metric"},
        ),
        (WHOLE.replace("path: data", "name: n") + "evaluation: {baseline: no}\n", set()),
        (
            WHOLE.replace("path: data", "name: n") + "evaluation: {baseline: no, final: no}\n",
            {"evaluation.max_rows", "evaluation.per_device_batch_size"},
        ),
    ],
)
def test_each_mode_has_its_keys_without_effect(text: str, expected: set[str]) -> None:
    config = load(text).config
    inert = inert_keys(config)
    best = {"checkpoint.keep_best", "checkpoint.best_metric"}  # nothing is evaluated beside the checkpoints
    always = {f"training.loss.{name}" for name in LossConfig.model_fields}
    always |= {"evaluation.control", "task.dataset.shuffle_buffer", "export.merge", "deepspeed.teacher"}
    always |= {f"teacher.{name}" for name in TeacherConfig.model_fields}
    always |= {f"distillation.{name}" for name in DistillationConfig.model_fields if name != "alpha"}
    assert set(inert) == always | (expected - WITH_EVALUATIONS if expected >= WITH_EVALUATIONS else expected | best)
    assert all(found(config, why.mode_key) != "absent" for why in inert.values())
    assert all(found(config, key) != "absent" for key in inert)
    assert not any(found(effective(config), key) != "absent" for key in inert)


def test_with_a_teacher_its_keys_have_their_effect() -> None:
    config = load(WHOLE + "teacher: {path: t}\ndistillation: {alpha: 0.5}\n").config
    inert = set(inert_keys(config))
    assert {key for key in inert if key.startswith(("teacher.", "distillation."))} == {
        *("distillation.beta", "distillation.skew", "distillation.missing_mass", "teacher.cache"),
    }
    assert "evaluation.control" not in inert
    assert unsupported(config) == {}


@pytest.mark.parametrize(("labels", "without_effect"), [(3, True), (1024, True), (1025, False), (None, False)])
def test_of_few_labels_a_cache_keeps_whole_logits(labels: int | None, without_effect: bool) -> None:
    config = load(WHOLE + "teacher: {path: t, placement: cached}\ndistillation: {alpha: 0.5}\n").config
    names = None if labels is None else [str(i) for i in range(labels)]
    config = config.model_copy(update={"task": config.task.model_copy(update={"labels": names})})
    for key in ("teacher.top_k", "distillation.missing_mass"):
        assert (key in inert_keys(config)) == without_effect
    lm = load(LM + "teacher: {path: t, placement: cached}\ndistillation: {alpha: 0.5}\n").config
    assert not {"teacher.top_k", "distillation.missing_mass"} & set(inert_keys(lm))


@pytest.mark.parametrize(
    ("divergence", "used"),
    [("jsd", "beta"), ("skew_kl", "skew"), ("skew_reverse_kl", "skew"), ("tvd", None), ("reverse_kl", None)],
)
def test_each_divergence_has_its_own_parameter(divergence: str, used: str | None) -> None:
    text = WHOLE + f"teacher: {{path: t}}\ndistillation: {{alpha: 0.5, divergence: {divergence}}}\n"
    inert = set(inert_keys(load(text).config))
    assert {"beta", "skew"} - {used} == {
        key.split(".")[1] for key in inert & {"distillation.beta", "distillation.skew"}
    }


def test_without_alpha_a_teacher_is_there_for_evaluations_alone() -> None:
    config = load(WHOLE + "teacher: {path: t}\nevaluation: {teacher: yes}\n").config
    inert = set(inert_keys(config))
    assert not {"teacher.path", "teacher.dtype", "teacher.placement"} & inert
    assert {"distillation.temperature", "distillation.hidden", "evaluation.control"} <= inert
    assert problems(WHOLE + "evaluation: {teacher: yes}\n") == about(
        ["c.yaml:3: evaluation.teacher is true, but there is no teacher; set teacher.path"]
    )


LM = "task: {type: causal_lm, dataset: {path: data}}\nmodel: {path: m}\n"
KD = "teacher: {path: t}\ndistillation: {alpha: 0.5}\n"


@pytest.mark.parametrize(
    ("text", "setting", "problem"),
    [
        (WHOLE, "distillation.divergence=uld", "distillation.divergence is uld, which aligns the tokens of causal LMs"),
        (LM, "distillation.divergence=jsd", "distillation.divergence is jsd, and a cached top k gives forward_kl only"),
        (LM, "distillation.relations.weight=1", "distillation.relations compares the rows of encoders, and task.type"),
        (WHOLE, "distillation.relations.weight=1", "distillation.relations needs the teacher's attention, which no"),
        (LM, "task.dataset.streaming=yes", "teacher.placement is cached, and the rows of a stream are not known"),
    ],
)
def test_what_does_not_go_together_with_a_teacher_is_refused(text: str, setting: str, problem: str) -> None:
    found = problems(text + KD + "training: {max_steps: 5}\n", setting, "teacher.placement=cached")
    assert len(found) == 1
    assert tells(found[0], problem)


def test_how_a_loss_is_computed_is_for_language_models() -> None:
    loss = "training: {loss: {memory_budget_gib: 1.5, precision: fp32, low_memory: yes}}\n"
    config = load(LM + loss).config
    assert not any(key.startswith("training.loss") for key in inert_keys(config))
    assert effective(config)["training"]["loss"] == {"memory_budget_gib": 1.5, "low_memory": True, "precision": "fp32"}
    Path("b.yaml").write_text("training: {loss: {precision: fp32, low_memory: yes}}\n")
    (notice,) = load("inherits: b.yaml\n" + WHOLE).notices
    reason = "b.yaml:1: task.type is classification, whose loss is computed from logits"
    assert notice == (
        about(f"without effect in this run: training.loss.low_memory ({reason}), training.loss.precision ({reason})")
    )
    assert problems(WHOLE + "training: {loss: {low_memory: yes}}\n") == about(
        [
            "c.yaml:3: training.loss.low_memory has no effect because task.type is classification, whose loss is "
            "computed from logits (c.yaml:1); remove one of them"
        ]
    )
    assert problems(LM + "training: {loss: {memory_budget_gib: 0}}\n")[0].startswith(
        "c.yaml:3: training.loss.memory_budget_gib is 0"
    )


STREAM = "task: {type: causal_lm, dataset: {path: data, streaming: yes}}\nmodel: {path: m}\ntraining: {max_steps: 5}\n"


def test_a_stream_has_its_own_keys_with_and_without_effect() -> None:
    config = load(STREAM).config
    assert unsupported(config) == {}
    assert {"training.length_grouping", "training.num_workers"} <= set(inert_keys(config))
    assert "task.dataset.shuffle_buffer" not in inert_keys(config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STREAM.replace("max_steps: 5", "epochs: 1"), "the number of its rows is unknown; set training.max_steps"),
        (STREAM.replace("path: data", "demo: chat"), "demo data are made at once; set it to false"),
        (
            STREAM.replace("path: data", "name: n"),
            "of a split on the hub only the first rows are evaluated then; set evaluation.max_rows",
        ),
        (
            STREAM.replace("{path: data, streaming: yes}", "{path: data, streaming: yes}, packing: yes"),
            "rows can be packed only where all are known; set task.packing: false",
        ),
        (
            STREAM.replace("path: m", "config: {model_type: llama}, new_tokenizer: {kind: bpe}"),
            "model.new_tokenizer is made from all training rows; name one with model.tokenizer",
        ),
        (
            STREAM.replace("causal_lm", "classification"),
            "only a causal_lm task reads its rows so; set it to false for classification",
        ),
    ],
)
def test_a_stream_that_cannot_be_trained_on_is_refused_with_the_way_out(text: str, expected: str) -> None:
    (problem,) = problems(text)
    assert tells(problem, f"task.dataset.streaming is true: {expected}")


def test_of_an_export_what_is_written_has_an_effect() -> None:
    def inert(model: str, export: str) -> set[str]:
        text = WHOLE.replace("path: m", f"path: m, {model}") + f"export: {{{export}}}\n"
        return {key for key in inert_keys(load(text).config) if key.startswith("export.")}

    assert inert("lora: {rank: 2}", "merge: yes, dtype: bfloat16") == set()
    assert inert("continue_adapter: yes", "merge: yes") == set()
    assert inert("lora: {rank: 2}", "merge: no") == {"export.dtype"}
    assert inert("adapter: a", "dtype: bfloat16") == {"export.merge"}


def test_a_batch_size_below_the_device_limit_is_no_clash() -> None:
    config = load(WHOLE + "training: {batch_size: 48, per_device_batch_size: 64}\n").config
    assert effective(config)["training"]["per_device_batch_size"] == 64


def load(text: str, *settings: str) -> LoadedConfig:
    Path("c.yaml").write_text(text)
    return load_config(Path("c.yaml"), settings)


def problems(text: str, *settings: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(text, *settings)
    return error.value.problems


def found(tree: object, dotted: str) -> object:
    node = tree.model_dump() if isinstance(tree, Config) else tree
    for key in dotted.split("."):
        if not isinstance(node, dict) or key not in node:
            return "absent"
        node = node[key]
    return node
