"""Whatever is wrong with a config is said in sentences with the place and the cure, all of it at once."""

from pathlib import Path

import pytest
from facts import about

from forge.config.loader import load_config
from forge.errors import ConfigError

WHOLE = "task: {type: classification, dataset: {path: data}}\nmodel: {path: m}\n"  # two lines
TRAINING_KEYS = (
    "epochs, max_steps, per_device_batch_size, gradient_accumulation_steps, batch_size, learning_rate, schedule, "
    "warmup_ratio, warmup_steps, weight_decay, adam_beta1, adam_beta2, adam_epsilon, max_grad_norm, seed, "
    "mixed_precision, gradient_checkpointing, compile, deterministic, length_grouping, num_workers, loss"
)
TOP_KEYS = (
    "task, model, teacher, distillation, training, deepspeed, evaluation, checkpoint, export, logging, tracking, "
    "output_root"
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WHOLE + "training:\n  seed: 1\n  'seed': 2\n",
         ":5: training.seed is given twice, first at c.yaml:4; keep only one of them"),
        (WHOLE + "training: {seed: 1, seed: 2}\n", ":3: training.seed is given twice; keep only one of them"),
        (WHOLE + "model: {path: n}\n", ":3: model is given twice, first at c.yaml:2; keep only one of them"),
        (WHOLE + "training: &t {seed: 1}\nevaluation:\n  <<: *t\n",
         ":5: the merge key << is not supported in forge configs; use inherits, or repeat the keys"),
        (WHOLE + "training: &t\n  x: *t\n", ":3: this value contains itself through an alias; write out its keys"),
        (WHOLE + "training: *nope\n",
         ":3: YAML syntax: found undefined alias 'nope'; check indentation, colons and brackets there"),
        (WHOLE + "training:\n\tseed: 1\n",
         ":4: YAML syntax: there is a tab where only spaces are allowed; indent with spaces"),
        (WHOLE + "---\n" + WHOLE,
         ":3: YAML syntax: a second document begins here; keep one document, and remove this `---`"),
        (WHOLE + "output_root: !env HOME\n",
         ":3: the YAML tag !env is not supported in forge configs; write only the value, in quotes if it is text"),
        (WHOLE + "output_root: !!python/object/apply:os.system ['ls']\n",
         ":3: the YAML tag !!python/object/apply:os.system is not supported in forge configs; write only the value, in "
         "quotes if it is text"),
        (WHOLE.encode() + b"# caf\xe9\n", ":3: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (WHOLE.encode("utf-16"), ":1: byte 0xff is not UTF-8; save the file as UTF-8"),
        (WHOLE + "output_root: a\x01\n", ":3: YAML does not allow the character #x0001; remove it"),
        *((text, ": is empty; give it keys, such as task and model") for text in ("", "# hi\n", "---\n", "null\n")),
        *((text, ":1: a config is a map of keys, such as `task:`") for text in ("- a\n- b\n", "hello\n", "3\n")),
        *((WHOLE + text, ":3: a key must be a word, such as `task:`") for text in ("? {a: b}\n: c\n", "'': c\n")),
        (WHOLE + "3: x\n", f":3: 3 is not a config key; the config has: {TOP_KEYS}"),
        (WHOLE + "null: x\n", f":3: null is not a config key; the config has: {TOP_KEYS}"),
        (WHOLE + "on: x\n", f":3: on is not a config key; the config has: {TOP_KEYS}"),
        (WHOLE + "training: {1: x}\n", f":3: training.1 is not a config key; training has: {TRAINING_KEYS}"),
        (WHOLE + "training.seed: 3\n",
         ":3: training.seed is written as one key; in a file it is a key in a map: `training: {seed: …}`"),
        (WHOLE + "x: " + "{a: " * 60 + "1" + "}" * 60 + "\n",
         ":3: maps and lists are nested more than 50 deep; make it flatter"),
        (WHOLE + "x: " + "[" * 5000 + "]" * 5000 + "\n",
         ": maps and lists are nested more than 50 deep; make it flatter"),
        (WHOLE + "x0: &a0 [l, l, l, l, l, l, l, l, l, l]\n"
         + "".join(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
         ":7: this expands to more than 100,000 values; use fewer aliases"),
    ],
)  # fmt: skip
def test_a_file_that_yaml_or_forge_cannot_read_says_why_and_where(text: str | bytes, expected: str) -> None:
    assert problems(text) == about([f"c.yaml{expected}"])


@pytest.mark.parametrize(
    ("inherits", "expected"),
    [
        ("nope.yaml", "inherits nope.yaml, which does not exist; the path is relative to the file that contains it"),
        ("bse.yaml", "inherits bse.yaml, which does not exist; did you mean base.yaml?"),
        ("/nowhere/x.yaml", "inherits /nowhere/x.yaml, which does not exist; check the path"),
        ("sub", "inherits sub, which is a folder; name a file in it"),
        ("", "inherits is empty; name the parent file, or remove the line"),
        ("''", "inherits is empty; name the parent file, or remove the line"),
        ("[base.yaml]", "inherits must be one file, not a list"),
        ("{a: b}", "inherits must be one file, not a map"),
        ("c.yaml", "inherits forms a cycle: c.yaml -> c.yaml; remove one `inherits`"),
        ("sub/../c.yaml", "inherits forms a cycle: c.yaml -> c.yaml; remove one `inherits`"),
    ],
)
def test_a_wrong_parent_is_told_where_it_is_named(inherits: str, expected: str) -> None:
    write(WHOLE, "base.yaml")
    write(WHOLE, "sub/x.yaml")
    # The key that is wrong besides is told as well, and nothing is called missing that the parent may hold.
    assert problems(f"inherits: {inherits}\ntraining: {{sed: 1}}\n") == about(
        [
            f"c.yaml:1: {expected}",
            "c.yaml:2: training.sed is not a config key; did you mean training.seed?",
        ]
    )


@pytest.mark.parametrize("name", ['"a\\0b"', "x" * 5000])
def test_a_parent_that_no_file_can_be_called_does_not_exist(name: str) -> None:
    (problem,) = problems(f"inherits: {name}\n{WHOLE}")
    assert problem.startswith("c.yaml:1: inherits ")
    assert "does not exist" in problem


def test_a_ring_names_its_files_and_its_heirs() -> None:
    write("inherits: a/c.yaml\n", "b.yaml")
    write("# a ring\ninherits: ../b.yaml\n", "a/c.yaml")
    assert problems("inherits: b.yaml\n" + WHOLE) == about(
        [
            "a/c.yaml:2: inherits forms a cycle: b.yaml -> a/c.yaml -> b.yaml; remove one `inherits` "
            "[inherited by b.yaml, by c.yaml]"
        ]
    )


def test_a_broken_parent_does_not_hide_the_mistakes_of_its_child() -> None:
    write("training: {seed: [\n", "b.yaml")
    assert problems("inherits: b.yaml\ntraining: {sed: 1}\n", "output_root=") == about(
        [
            "c.yaml:2: training.sed is not a config key; did you mean training.seed?",
            "b.yaml:2: YAML syntax: expected the node content, but found '<stream end>' while parsing a flow node; "
            "check indentation, colons and brackets there [inherited by c.yaml]",
            "--set output_root=: output_root is null; it must be text",
        ]
    )


def test_all_mistakes_come_at_once_in_the_order_of_their_places_the_named_file_first() -> None:
    write("training:\n  epochs: x\n  sed: 1\n", "base.yaml")
    text = """\
inherits: base.yaml
foo: 1
task: {type: classification, prompt: x, dataset: {path: x, max_rows: -1}, columns: {txt: a}}
model:
  path: m
  dropuot: 1
training:
  lr: 1
  seed: x
  seed: y
"""
    assert problems(text, "a.b=3", "nonsense", epochs="0") == about(
        [
            f"c.yaml:2: foo is not a config key; the config has: {TOP_KEYS}",
            "c.yaml:3: task.dataset.max_rows is -1; it must be greater than 0, or null",
            "c.yaml:3: task.columns.txt is not a config key; did you mean task.columns.text?",
            "c.yaml:3: task.prompt is a key of task.type ocr, but this task is of type classification",
            "c.yaml:6: model.dropuot is not a config key; did you mean model.dropout?",
            "c.yaml:8: training.lr is not a config key; did you mean training.learning_rate?",
            "c.yaml:9: training.seed is `x`; it must be a whole number",
            "c.yaml:10: training.seed is given twice, first at c.yaml:9; keep only one of them",
            "base.yaml:3: training.sed is not a config key; did you mean training.seed? [inherited by c.yaml]",
            f"--set a.b=3: a is not a config key; the config has: {TOP_KEYS}",
            "--set nonsense: must have the form key=value with a dotted key, such as training.seed=1",
            "--epochs: training.epochs is 0; it must be greater than 0",
        ]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tsak: {}\nmodel: {path: m}\n", ":1: tsak is not a config key; did you mean task?"),
        ("model: {path: m}\n", ": task is missing; set it here or in a parent"),
        ("task: {tpye: classification, dataset: {path: x}}\nmodel: {path: m}\n",
         ":1: task.tpye is not a config key; did you mean task.type?"),
        ("task: {type: classification}\nmodel: {path: m}\n",
         ":1: task.dataset is missing; set it here or in a parent"),
        ("task: {type: classification, dataset: {max_rows: 3}}\nmodel: {path: m}\n",
         ":1: task.dataset has no source: set one of task.dataset.name, task.dataset.path and task.dataset.demo"),
        (WHOLE.replace("path: m", ""),
         ":2: model has no source: set model.path, or model.config to build one from scratch"),
        (WHOLE.replace("path: m", "config: {model_type: bert}"),
         ":2: model is built from model.config so it needs model.tokenizer or model.new_tokenizer"),
        (WHOLE.replace("path: m", "tokenizer: t, config: {layers: 1}"),
         ":2: model is built from model.config so it needs model.config.model_type, such as bert"),
        (WHOLE.replace("path: m", "path: m, config: {model_type: bert}"),
         ":2: model.config is an alternative to model.path (c.yaml:2); keep only one of them"),
        (WHOLE.replace("path: data", "path: d, demo: nli, name: n"),
         ":1: task.dataset.demo is an alternative to task.dataset.name (c.yaml:1) and task.dataset.path (c.yaml:1); "
         "keep one of them"),
        (WHOLE + "training:\n  epochs: 2\n  max_steps: 5\n",
         ":5: training.max_steps is an alternative to training.epochs (c.yaml:4); keep only one of them"),
        (WHOLE + "training: {inherits: x.yaml}\n",
         ":3: training.inherits is not a config key; inherits is only allowed at the top level of a file"),
        (WHOLE + "tracking:\n  wandb:\n    tags:\n      - a\n      - [b]\n",
         ":7: tracking.wandb.tags.1 is a list; it must be text, in quotes if it has brackets, braces, a dash or a "
         "colon in it"),
    ],
)  # fmt: skip
def test_what_is_missing_or_doubled_is_told_once(text: str, expected: str) -> None:
    assert problems(text) == about([f"c.yaml{expected}"])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("task.type=ocrr", "task.type is `ocrr`; it must be one of classification, ocr, causal_lm; did you mean ocr?"),
        ("task.dataset.demo=x", "task.dataset.demo is `x`; it must be one of nli, lines, chat, or null"),
        ("training.schedule=cos",
         "training.schedule is `cos`; it must be one of linear, cosine, constant; did you mean cosine?"),
        ("training.schedule=step", "training.schedule is `step`; it must be one of linear, cosine, constant"),
        ("training.mixed_precision=BF16",
         "training.mixed_precision is `BF16`; it must be one of auto, bf16, fp16, no; did you mean bf16?"),
        ("tracking.wandb.mode=disabled", "tracking.wandb.mode is `disabled`; it must be one of online, offline"),
        ("task.dataset.max_rows=0", "task.dataset.max_rows is 0; it must be greater than 0, or null"),
        ("task.max_length=3", "task.max_length is 3; it must be at least 4"),
        ("model.dropout=1", "model.dropout is 1; it must be less than 1, or null"),
        ("model.dropout=-1", "model.dropout is -1; it must be at least 0, or null"),
        ("distillation.alpha=1.5", "distillation.alpha is 1.5; it must be at most 1"),
        ("distillation.alpha=-0.1", "distillation.alpha is -0.1; it must be at least 0"),
        ("distillation.temperature=0", "distillation.temperature is 0; it must be greater than 0"),
        ("distillation.temperature=-2", "distillation.temperature is -2; it must be greater than 0"),
        ("distillation.beta=1", "distillation.beta is 1; it must be less than 1"),
        ("distillation.beta=0", "distillation.beta is 0; it must be greater than 0"),
        ("distillation.skew=1", "distillation.skew is 1; it must be less than 1"),
        ("distillation.skew=-0.5", "distillation.skew is -0.5; it must be at least 0"),
        ("training.epochs=0", "training.epochs is 0; it must be greater than 0"),
        ("training.max_steps=0", "training.max_steps is 0; it must be greater than 0, or null"),
        ("training.per_device_batch_size=0", "training.per_device_batch_size is 0; it must be greater than 0"),
        ("training.gradient_accumulation_steps=0",
         "training.gradient_accumulation_steps is 0; it must be greater than 0"),
        ("training.batch_size=0", "training.batch_size is 0; it must be greater than 0, or null"),
        ("training.learning_rate=0", "training.learning_rate is 0; it must be greater than 0"),
        ("training.warmup_ratio=2", "training.warmup_ratio is 2; it must be at most 1"),
        ("training.warmup_ratio=-1", "training.warmup_ratio is -1; it must be at least 0"),
        ("training.warmup_steps=-1", "training.warmup_steps is -1; it must be at least 0, or null"),
        ("training.weight_decay=-1", "training.weight_decay is -1; it must be at least 0"),
        ("training.adam_beta1=1", "training.adam_beta1 is 1; it must be less than 1"),
        ("training.adam_beta2=-1", "training.adam_beta2 is -1; it must be at least 0"),
        ("training.adam_epsilon=0", "training.adam_epsilon is 0; it must be greater than 0"),
        ("training.max_grad_norm=0", "training.max_grad_norm is 0; it must be greater than 0, or null"),
        ("training.seed=-1", "training.seed is -1; it must be at least 0"),
        ("training.seed=4294967296", "training.seed is 4294967296; it must be less than 4294967296"),
        ("training.num_workers=-1", "training.num_workers is -1; it must be at least 0, or null"),
        ("evaluation.every_steps=0", "evaluation.every_steps is 0; it must be greater than 0, or null"),
        ("evaluation.max_rows=0", "evaluation.max_rows is 0; it must be greater than 0, or null"),
        ("checkpoint.best_metric=matched/loss",
         "checkpoint.best_metric is `matched/loss`; it must be matched/ce, as that metric is now called"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last is 0; it must be greater than 0"),
        ("logging.every_steps=0", "logging.every_steps is 0; it must be greater than 0"),
        ("training.learning_rate=fast", "training.learning_rate is `fast`; it must be a number"),
        ("training.learning_rate=inf", "training.learning_rate is `inf`; it must be a finite number"),
        ("training.learning_rate=nan", "training.learning_rate is `nan`; it must be a finite number"),
        ("training.learning_rate=true", "training.learning_rate is `true`; it must be a number"),
        ("training.seed=1e3", "training.seed is `1e3`; it must be a whole number"),
        ("training.seed=2026-11-23", "training.seed is `2026-11-23`; it must be a whole number"),
        ("training.seed=0o17", "training.seed is `0o17`; it must be a whole number"),
        (f"training.seed={'x' * 99}", f"training.seed is `{'x' * 60}…`; it must be a whole number"),
        ("evaluation.final=1", "evaluation.final is `1`; it must be true or false"),
        ("evaluation.final=null", "evaluation.final is null; it must be true or false"),
        ("evaluation.every_steps=never", "evaluation.every_steps is `never`; it must be a whole number, or null"),
        ("task.labels=[a]", "task.labels has one entry; it needs at least 2"),
        ("task.labels=[]", "task.labels has no entries; it needs at least 2"),
        ("task.labels=a", "task.labels is `a`; it must be a list, such as [a, b], or null"),
        ("task.labels=[a, null]", "task.labels.1 is null; it must be text"),
        ("tracking.wandb=false",
         "tracking.wandb is `false`; it must be a map of keys, such as wandb: {project: forge}, or null"),
        ("deepspeed=zero2", "deepspeed is `zero2`; it must be a map of keys, such as deepspeed: {student: zero2}"),
        ("task.dataset=glue", "task.dataset is `glue`; it must be a map of keys, such as dataset: {name: glue} for one "
         "of the hub, or {path: glue} for a folder"),
        ("model.lora=true",
         "model.lora is `true`; it must be a map of keys, such as lora: {rank: 16}, or null"),
        ("task.sequence_len=5", "task.sequence_len is not a config key; did you mean task.max_length?"),
        ("model.lora.r=8", "model.lora.r is not a config key; did you mean model.lora.rank?"),
        ("training.optim=adamw", "training.optim is not a config key: forge trains with AdamW: training.weight_decay, "
         "adam_beta1, adam_beta2, adam_epsilon"),
        ("adapter=lora", "adapter is not a config key: an adapter is trained by model.lora, such as `model: {lora: "
         "{rank: 16}}`"),
        ("training=3", "training is `3`; it must be a map of keys"),
        ("training=[a]", "training is a list; it must be a map of keys"),
        ("training=", "training is empty; give it keys, or remove it"),
        ("task.dataset=null", "task.dataset is empty; give it keys, or remove it"),
        ("output_root=''", "output_root is empty; it must be text"),
        ("output_root=a: b",
         "output_root is a map of keys; it must be text, in quotes if it has brackets, braces, a dash or a colon "
         "in it"),
        ("output_root=[x",
         "YAML syntax: expected ',' or ']', but got '<stream end>' while parsing a flow sequence; put "
         "the value in quotes, such as output_root='\"…\"'"),
        ("output_root=!x",
         "the YAML tag !x is not supported in forge configs; write only the value, in quotes if it is text"),
        ("training={seed: 1, seed: 2}", "training.seed is given twice; keep only one of them"),
        ("inherits=b.yaml", "inherits is not a config key; inherits is only allowed at the top level of a file"),
        *((wrong, "must have the form key=value with a dotted key, such as training.seed=1")
          for wrong in ("training.seed", "=3", "training..seed=3", "training.seed =3", "", "training.séed=1")),
        ("trainig.seed=1", "trainig is not a config key; did you mean training?"),
        ("seed=1", "seed is not a config key; did you mean training.seed?"),
        ("training.num_train_epochs=1", "training.num_train_epochs is not a config key; did you mean training.epochs?"),
        ("distillation.alpha=0.5",
         "distillation.alpha is 0.5, but there is no teacher; set teacher.path, or alpha to 0"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_told_with_what_would_be_right(setting: str, expected: str) -> None:
    assert problems(WHOLE, setting) == about([f"--set {setting}: {expected}"])


def test_two_alternatives_on_the_command_line_are_a_mistake() -> None:
    both = "training.epochs is an alternative to training.max_steps (--max_steps); keep only one of them"
    assert problems(WHOLE, max_steps="3", epochs="2") == about([f"--epochs: {both}"])
    assert problems(WHOLE, "training.epochs=2", max_steps="3") == about([f"--set training.epochs=2: {both}"])


@pytest.mark.parametrize("text", ["", "x", "null", "[1]", "3.5"])
def test_a_flag_is_text_and_no_yaml(text: str) -> None:
    assert problems(WHOLE, max_steps=text) == about(
        [f"--max_steps: training.max_steps is `{text}`; it must be a whole number, or null"]
    )


def test_every_mistake_is_one_line() -> None:
    (problem,) = problems(WHOLE, 'training.seed="a\nb"')
    assert problem == about('--set training.seed="a b": training.seed is `a b`; it must be a whole number')


def test_a_missing_file_and_a_folder_are_told() -> None:
    write(WHOLE, "sub/near.yaml")
    assert load_problems("sub/naer.yaml") == about(
        ["sub/naer.yaml: there is no such config file; did you mean near.yaml?"]
    )
    assert load_problems("x.yaml") == about(
        [f"x.yaml: there is no such config file; check the path (you are in {Path.cwd()})"]
    )
    assert load_problems("sub") == about(["sub: is a folder, not a config file; name a file in it: near.yaml"])


def problems(text: str | bytes, *settings: str, **flags: str) -> list[str]:
    write(text, "c.yaml")
    return load_problems("c.yaml", *settings, **flags)


def load_problems(name: str, *settings: str, **flags: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(Path(name), settings, **flags)  # type: ignore[arg-type]
    return error.value.problems


def write(text: str | bytes, name: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
