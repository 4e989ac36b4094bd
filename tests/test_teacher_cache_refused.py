"""A cache that is of something else, damaged or unfinished is refused, with what differs and what to do."""

import argparse
import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import Death, batch_of, distilled, fill, lm_config, opened, reset
from conftest import REPOSITORY
from conversations import config_on, conversation
from teachers import write_chat_teacher, write_classifier
from test_ocr import TEXTS, config_of, with_model, write_images
from transformers import AutoModelForSequenceClassification

from forge.attempt.components import load_components
from forge.cli.arguments import add_config_arguments
from forge.cluster.signals import StopRequest
from forge.config.loader import LoadedConfig, load_config
from forge.config.schema import Config
from forge.errors import TrainingError, UsageError
from forge.ranks.world import join_ranks
from forge.run.files import read_json
from forge.task.classification import Classification
from forge.task.load import load_task
from forge.teacher.teacher import ModelTeacher
from forge.teacher_cache import files as storage
from forge.teacher_cache.files import Manifest, Shard, only_writer
from forge.teacher_cache.job import report
from forge.teacher_cache.key import LAYERS, cache_key, changed, content_key
from forge.teacher_cache.reader import check_loss
from forge.teacher_cache.writer import CacheWriter


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Its outputs are contradiction, entailment, neutral; the data's labels entailment, neutral, contradiction."""
    return write_classifier(tmp_path_factory.mktemp("teacher"), tiny_model)


@pytest.fixture(scope="module")
def chat_teacher(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Path:
    return write_chat_teacher(tmp_path_factory.mktemp("chat_teacher"), chat_model)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    reset()


def test_a_missing_cache_is_refused_with_the_command_and_with_what_the_nearest_lacks(
    config_file: Path, teacher: Path
) -> None:
    cached = distilled(teacher, "teacher.placement=cached")
    with pytest.raises(UsageError) as refused:
        opened(load_config(config_file, cached).config)
    for part in (
        ".teacher_caches has no cache for this config",
        "`forge cache-teacher X.yaml`",
        "placement: replicated",
    ):
        assert part in str(refused.value)
    fill(load_config(config_file, [*cached, "task.max_length=16"]).config)
    fill(load_config(config_file, [*cached, "task.max_length=12", "task.dataset.max_rows=9"]).config)
    with pytest.raises(UsageError) as refused:
        opened(load_config(config_file, cached).config)
    assert re.search(r"the nearest one, .*, differs in .*task\.max_length \(16 -> 32\)\)", str(refused.value))


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("task.max_length=16", r"task\.max_length \(32 -> 16\)"),
        ("task.dataset.max_rows=20", r"task\.dataset\.max_rows \(null -> 20\)"),
        ("teacher.dtype=bfloat16", r"teacher\.dtype \(float32 -> bfloat16\)"),
        ("distillation.hidden.layers={1: 1}", r"distillation\.hidden\.layers \(the teacher's\) \(\[\] -> \[1\]\)"),
        ("teacher.path={other}", r"the teacher's weights \([0-9a-f]{12}… -> [0-9a-f]{12}…\)"),
        ("task.columns.text=hypothesis", r"the rows, or their tokens \([0-9a-f]{12}… -> [0-9a-f]{12}…\)"),
    ],
)
def test_another_cache_is_refused_by_what_has_changed(
    config_file: Path, teacher: Path, tiny_model: Path, tmp_path: Path, setting: str, part: str
) -> None:
    named = f"teacher.cache={tmp_path / 'kept'}"
    fill(load_config(config_file, distilled(teacher, named)).config)
    other = write_classifier(tmp_path / "other", tiny_model, seed=9)
    pair = ["task.columns.text_pair=null"] if "columns" in setting else []
    changed = [named, *pair, "teacher.placement=cached", setting.replace("{other}", str(other))]
    changed = [*distilled(teacher)[1:], f"teacher.path={teacher}", *changed]
    with pytest.raises(UsageError, match=part) as refused:
        opened(load_config(config_file, changed).config)
    assert f"teacher.cache: {tmp_path / 'kept'} holds outputs of {teacher}" in str(refused.value)
    if "hidden" not in setting:
        assert len(re.findall("->", str(refused.value))) <= 4  # and of little else
    with pytest.raises(UsageError, match=part):  # nor does a job write into it
        fill(load_config(config_file, changed).config)


def test_of_a_top_k_the_key_has_k_and_temperature(tmp_path: Path, chat_model: Path, chat_teacher: Path) -> None:
    named = f"teacher.cache={tmp_path / 'kept'}"
    fill(lm_config(tmp_path, chat_model, chat_teacher, named, "teacher.top_k=4"))
    other = ("teacher.top_k=5", "distillation.temperature=3", "teacher.placement=cached")
    with pytest.raises(UsageError, match=r"teacher\.top_k \(4 -> 5\), distillation\.temperature \(2\.0 -> 3\.0\)"):
        opened(lm_config(tmp_path, chat_model, chat_teacher, named, *other))


def test_the_key_tells_tokenizer_template_and_padding_from_rows(
    tmp_path: Path, chat_model: Path, load_lm: Callable[..., Any]
) -> None:
    rows = [conversation(i) for i in range(6)]
    task = load_lm(rows, rows[:2])
    config = config_on(tmp_path, chat_model, rows, rows[:2], "teacher.path=t", "distillation.alpha=0.5")
    origin = read_origin(chat_model)
    before = content_key(config, task, origin, "float32")
    assert content_key(config, load_lm(rows, rows[:2]), origin, "float32") == before

    task.processing.padding_side = "left" if task.processing.padding_side == "right" else "right"
    (part,) = changed(before, content_key(config, task, origin, "float32"))
    assert part.startswith("the tokenizer (")
    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    other = load_lm(rows, rows[:2], f"task.chat_template={template}")
    names = [part.split(" (")[0] for part in changed(before, content_key(config, other, origin, "float32"))]
    assert "the chat template" in names
    other = load_lm([*rows[:5], conversation(9)], rows[:2])
    (part,) = changed(before, content_key(config, other, origin, "float32"))
    assert part.startswith("the rows, or their tokens (")


def test_the_key_sees_other_tokens_of_the_same_rows(config_file: Path, tiny_model: Path) -> None:
    config = load_config(config_file, ["teacher.path=t", "distillation.alpha=0.5"]).config
    task = load_task(config)
    assert isinstance(task, Classification)
    before = cache_key(config, task, read_origin(tiny_model), "float32", ())
    columns = task.train.to_dict()
    columns["token_type_ids"][3][0] ^= 1
    other = type(task.train).from_dict(columns)
    object.__setattr__(task, "train", other)
    (part,) = changed(before, cache_key(config, task, read_origin(tiny_model), "float32", ()))
    assert part.startswith("the rows, or their tokens (")


def read_origin(folder: Path) -> Any:
    from forge.model.origin import Origin, WeightFiles

    return Origin(WeightFiles(name="t", location=str(folder), sha256="0" * 64))


def test_the_key_has_the_teachers_labels_its_image_processor_and_the_token_before_a_transcript(
    config_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def names(before: Any, after: Any) -> list[str]:
        return [part.split(" (")[0] for part in changed(before, after)]

    settings = ["teacher.path=t", "distillation.alpha=0.5"]
    task, origin = load_task(load_config(config_file, settings).config), read_origin(tiny_model)
    keys = [
        cache_key(load_config(config_file, [*settings, *more]).config, task, origin, "float32", ())
        for more in ([], ["teacher.labels=[a, b, c]"])
    ]
    assert names(*keys) == ["teacher.labels"]

    for split in ("train", "validation"):
        write_images(tmp_path / "lines" / split, TEXTS[:3])
    ocr, _ = with_model(tmp_path / "lines")
    config = config_of(tmp_path / "lines")
    before = cache_key(config, ocr, origin, "float32", ())
    object.__setattr__(ocr.reader, "start", 7)
    assert names(before, cache_key(config, ocr, origin, "float32", ())) == ["the token that a transcript begins after"]
    object.__setattr__(ocr.reader, "start", ocr.processing.tokenizer.bos_token_id)
    ocr.processing.image_processor.image_mean = [0.25, 0.25, 0.25]
    assert names(before, cache_key(config, ocr, origin, "float32", ())) == ["the image processor"]


def test_the_teachers_padding_side_is_in_the_key_where_it_reads_tokens_of_its_own(
    config_file: Path, tiny_model: Path
) -> None:
    config = load_config(config_file, ["teacher.path=t", "distillation.alpha=0.5"]).config
    task, origin = load_task(config), read_origin(tiny_model)
    own = copy.deepcopy(task.processing)
    before, after = (
        content_key(config, replace(task, teacher_tokenizer=tokenizer), origin, "float32")  # type: ignore[type-var]
        for tokenizer in (own, with_side(copy.deepcopy(own), "left"))
    )
    (part,) = changed(before, after)
    assert part.startswith("the teacher's tokenizer (")


def with_side(tokenizer: Any, side: str) -> Any:
    tokenizer.padding_side = side
    return tokenizer


def test_another_config_of_the_same_weights_is_another_teacher(
    config_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder, named = write_classifier(tmp_path / "t", tiny_model), f"teacher.cache={tmp_path / 'kept'}"
    fill(load_config(config_file, distilled(folder, named)).config)
    cached = load_config(config_file, distilled(folder, named, "teacher.placement=cached")).config
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "_name_or_path": "x", "transformers_version": "1", "dtype": "bfloat16"}))
    opened(cached)
    permuted = {str(i): name for i, name in enumerate(["neutral", "contradiction", "entailment"])}
    for change in ({"num_attention_heads": values["num_attention_heads"] // 2}, {"id2label": permuted}):
        file.write_text(json.dumps({**values, **change}))
        with pytest.raises(UsageError, match=r"has changed: the teacher's config \("):
            opened(cached)


def test_a_template_is_what_it_says_and_not_where_it_lies(tmp_path: Path, chat_model: Path, chat_teacher: Path) -> None:
    text = (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    kept = f"teacher.cache={tmp_path / 'kept'}"
    for name in ("a", "b"):
        (tmp_path / f"{name}.jinja").write_text(text)
    made, wanted = ([kept, f"task.chat_template={tmp_path / name}.jinja"] for name in ("a", "b"))
    fill(lm_config(tmp_path, chat_model, chat_teacher, *made))
    opened(lm_config(tmp_path, chat_model, chat_teacher, *wanted, "teacher.placement=cached"))


def test_the_command_that_is_told_makes_the_cache(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    user = [
        "--set",
        "task.max_length=24",
        *(f"--set={item}" for item in distilled(teacher, "teacher.placement=cached")),
    ]
    user += ["--output_root", str(tmp_path / "an other"), "--debug", "--run_name", "x"]
    command = ["python", "-u", "forge.py", "--config", str(config_file), *user]

    def loaded(words: list[str]) -> LoadedConfig:
        args = parse_arguments(words)
        return load_config(Path(args.config), args.set, debug=args.debug, output_root=args.output_root)

    def parse_arguments(words: list[str]) -> Any:
        parser = argparse.ArgumentParser()
        parser.add_argument("config")
        add_config_arguments(parser)
        return parser.parse_args(words)

    wanted = loaded([str(config_file), *user[:-2]])
    reset()
    with pytest.raises(UsageError) as refused:
        load_components(wanted, join_ranks(wanted.config, StopRequest()), command)
    (told,) = re.findall("`(forge cache-teacher .*?)`", str(refused.value))
    words = shlex.split(told)
    assert loaded(words[2:]).config == wanted.config
    fill(loaded(words[2:]).config)
    reset()
    load_components(wanted, join_ranks(wanted.config, StopRequest()), command)


def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards are written, and the manifest is not."""

    def dies(*_: Any) -> Any:
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr("forge.teacher_cache.job._complete", dies)
        with pytest.raises(Death):
            fill(config)


def test_a_cache_that_is_repaired_is_not_complete_until_it_is(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the new shard has other bits, and the job is killed behind it."""
    monkeypatch.setattr(storage, "SHARD_ROWS", 20)
    settings = distilled(teacher)
    cached = load_config(config_file, [*settings, "teacher.placement=cached"]).config
    folder, manifest = fill(load_config(config_file, settings).config)
    (folder / "train-00001.safetensors").unlink()
    other = load_config(config_file, [*settings, "evaluation.per_device_batch_size=3"]).config
    interrupted(other, monkeypatch)
    with pytest.raises(UsageError, match="is not complete; resume `"):
        opened(cached)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": manifest["shards"][:1]}))  # of other shards
    _, again = fill(other)
    assert len(again["shards"]) == len(manifest["shards"])
    opened(cached)


@pytest.mark.parametrize("text", ["", "[]", '{"format"'])
def test_a_torn_manifest_is_told_and_written_anew(config_file: Path, teacher: Path, text: str) -> None:
    settings = distilled(teacher)
    cached = load_config(config_file, [*settings, "teacher.placement=cached"]).config
    folder, manifest = fill(load_config(config_file, settings).config)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=r"manifest\.json is damaged \(.*; run `forge cache-teacher`"):
        opened(cached)
    assert fill(load_config(config_file, settings).config)[1]["shards"] == manifest["shards"]
    opened(cached)
    (folder / "key.json").write_text(text)
    for use in (lambda: opened(cached), lambda: fill(cached)):
        with pytest.raises(UsageError, match=rf"key\.json is damaged \(.*; delete {folder}"):
            use()


def test_a_manifest_of_as_many_shards_with_other_bytes_is_not_that_of_these(config_file: Path, teacher: Path) -> None:
    folder, manifest = fill(load_config(config_file, distilled(teacher)).config)
    shards = [Shard(*(item[name] for name in ("split", "number", "first", "rows"))) for item in manifest["shards"]]
    assert storage.complete_manifest(folder, shards) == storage.read_manifest(folder)
    manifest["shards"][0]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert storage.complete_manifest(folder, shards) is None


def test_a_model_that_gives_fewer_hidden_states_than_its_config_says_is_refused(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelTeacher, "hidden_widths", lambda self, batch: (32, 32))
    with pytest.raises(UsageError, match="teacher's layer 2, but it has only 1"):
        fill(load_config(config_file, distilled(teacher, "distillation.hidden.layers={1: 2}")).config)


def test_a_kill_before_the_key_leaves_a_folder_that_can_be_used(
    config_file: Path, teacher: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / ".lock").touch()
    (kept / ".key.json.abcdef.tmp").write_text("{")
    fill(load_config(config_file, distilled(teacher, f"teacher.cache={kept}")).config)
    assert not list(kept.glob(".*.tmp"))


@pytest.mark.parametrize("text", ['{"format": 1}', '{"format": 2}', "junk"])
def test_a_neighbour_that_cannot_be_read_is_not_looked_at(config_file: Path, teacher: Path, text: str) -> None:
    cached = load_config(config_file, distilled(teacher, "teacher.placement=cached")).config
    other = Path(cached.output_root) / ".teacher_caches" / "aaaa"
    other.mkdir(parents=True)
    (other / "key.json").write_text(text)
    with pytest.raises(UsageError, match=r"\.teacher_caches has no cache for this config; create it"):
        opened(cached)
    fill(cached)
    opened(cached)


def test_a_file_is_no_folder(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load_config(config_file, distilled(teacher, f"teacher.cache={tmp_path / 'file'}")).config
    for use in (fill, opened):
        with pytest.raises(UsageError, match=r"teacher.cache is \S*file, which is a file; name a folder"):
            use(config)


def test_run_and_job_take_a_complete_cache_with_more_hidden_states(
    config_file: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, none = "distillation.hidden.layers={1: 2}", load_config(config_file, distilled(teacher)).config
    cached = load_config(config_file, distilled(teacher, "teacher.placement=cached")).config
    interrupted(none, monkeypatch)
    with_more = load_config(config_file, distilled(teacher, more)).config
    interrupted(with_more, monkeypatch)
    (own,) = (path for path in (Path(none.output_root) / ".teacher_caches").iterdir()
              if not read_json(path / "key.json")["key"][LAYERS])  # fmt: skip
    with pytest.raises(UsageError, match=f"the cache {own} is not complete"):  # nor is the other
        opened(cached)
    folder, manifest = fill(with_more)
    assert opened(cached)[2].folder == folder != own
    monkeypatch.setattr("forge.teacher_cache.job.load_teacher", None)
    assert fill(none) == (folder, manifest)
    named = f"teacher.cache={folder}"
    assert fill(load_config(config_file, distilled(teacher, named)).config) == (folder, manifest)


def test_a_default_folder_with_another_key_is_refused(config_file: Path, teacher: Path) -> None:
    folder, _ = fill(load_config(config_file, distilled(teacher)).config)
    values = read_json(folder / "key.json")
    values["key"]["teacher.dtype"] = "bfloat16"
    (folder / "key.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"another teacher or other rows: teacher.dtype \(bfloat16 -> float32\)"):
        opened(load_config(config_file, distilled(teacher, "teacher.placement=cached")).config)


def test_shards_of_another_plan_are_written_anew(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later forge cuts the rows otherwise, under the same names."""
    config = load_config(config_file, distilled(teacher)).config
    monkeypatch.setattr(storage, "SHARD_ROWS", 16)
    interrupted(config, monkeypatch)
    monkeypatch.setattr(storage, "SHARD_ROWS", 20)
    _, manifest = fill(config)
    rows = [shard["rows"] for shard in manifest["shards"] if shard["split"] == "train"]
    assert rows == [20, 20, 8]
    task, reader, _ = opened(load_config(config_file, distilled(teacher, "teacher.placement=cached")).config)
    batch = batch_of(task, 17, 25, 47)
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(reader.outputs(batch, None, 1.0)["logits"], expected, rtol=1e-5, atol=1e-5)


def test_bytes_are_hashed_once_and_again_when_a_file_is_another(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = fill(load_config(config_file, distilled(teacher)).config)
    cached = load_config(config_file, distilled(teacher, "teacher.placement=cached")).config
    file, hashed, damage = folder / "train-00000.safetensors", [], storage.damage

    def counted(folder: Path, record: Any, *, sizes_only: bool = False) -> str | None:
        if not sizes_only:
            hashed.append(record.shard.file)
        return damage(folder, record, sizes_only=sizes_only)

    monkeypatch.setattr(storage, "damage", counted)
    opened(cached)
    assert not hashed  # the job has just written them
    for change in (lambda: os.utime(file), lambda: (folder / "verified.json").write_text("{")):
        change()
        opened(cached)
        assert len(hashed) == 3
        opened(cached)
        assert len(hashed) == 3
        hashed.clear()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):  # what is damaged is never taken for verified
        with pytest.raises(UsageError, match="its bytes are not those that were written"):
            opened(cached)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_shard_is_named_and_written_anew(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(storage, "SHARD_ROWS", 20)
    settings = distilled(teacher)
    folder, _ = fill(load_config(config_file, settings).config)
    file = folder / "train-00001.safetensors"
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-1])
    elif damage == "changed":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        file.unlink()
    cached = load_config(config_file, [*settings, "teacher.placement=cached"]).config
    with pytest.raises(UsageError, match=rf"{file} .*`forge cache-teacher X.yaml` to write it again"):
        opened(cached)
    computed: list[Shard] = []
    compute = CacheWriter.compute
    monkeypatch.setattr(CacheWriter, "compute", lambda self, shard: computed.append(shard) or compute(self, shard))
    fill(load_config(config_file, settings).config)
    assert computed == [Shard("train", 1, 20, 20)]
    assert file.read_bytes() == whole
    opened(cached)


def test_a_complete_cache_is_left_as_it_is_and_no_teacher_loaded(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(config_file, distilled(teacher)).config
    folder, manifest = fill(config)
    monkeypatch.setattr("forge.teacher_cache.job.load_teacher", None)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert fill(config) == (folder, manifest)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_folders_that_are_something_else_are_left_alone(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    settings = distilled(teacher, f"teacher.cache={tmp_path / 'mine'}")
    with pytest.raises(UsageError, match=r"mine is not a teacher cache, and not empty; name another folder"):
        fill(load_config(config_file, settings).config)
    with pytest.raises(UsageError, match=r"mine, which is not a teacher cache \(it has no key.json\)"):
        opened(load_config(config_file, [*settings, "teacher.placement=cached"]).config)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("warm_starts")
def test_two_jobs_do_not_fill_one_folder(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    code = "import sys, time; from pathlib import Path; from forge.teacher_cache.files import only_writer\n"
    code += "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, str(kept)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="kept is being filled by another process; wait for it"):
            fill(load_config(config_file, distilled(teacher, f"teacher.cache={kept}")).config)
        other.kill()
    fill(load_config(config_file, distilled(teacher, f"teacher.cache={kept}")).config)
    with only_writer(kept):
        pass


def test_other_labels_speak_of_the_teachers(
    config_file: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, manifest = fill(load_config(config_file, distilled(teacher)).config)
    manifest["labels"] = ["yes", "no", "maybe"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"the teacher's \(yes, no, maybe\) .*teacher\.labels"):
        opened(load_config(config_file, distilled(teacher, "teacher.placement=cached")).config)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["distillation.alpha=0.5"], "teacher.path is not set"),
        (["teacher.path=x", "task.dataset.streaming=true"], "task.dataset.streaming is true"),
    ],
)
def test_configs_that_cannot_be_cached_are_refused(
    tmp_path: Path, chat_model: Path, settings: list[str], part: str
) -> None:
    rows = [conversation(0)]
    config = config_on(tmp_path, chat_model, rows, rows)
    values = config.model_dump()
    for setting in settings:
        (*path, last), value = setting.split("=")[0].split("."), setting.split("=")[1]
        node = values
        for name in path:
            node = node[name]
        node[last] = value
    with pytest.raises(UsageError, match=part):
        fill(Config.model_validate(values))


def test_a_layer_that_the_teacher_lacks_is_refused(config_file: Path, teacher: Path) -> None:
    with pytest.raises(UsageError, match="the teacher has no layer 3"):
        fill(load_config(config_file, distilled(teacher, "distillation.hidden.layers={1: 3}")).config)


def test_a_top_k_gives_forward_kl_only(config_file: Path) -> None:
    config = load_config(
        config_file, ["teacher.path=t", "distillation.alpha=0.5", "distillation.divergence=jsd"]
    ).config
    check_loss(config, top_k=False)
    with pytest.raises(UsageError, match=r"divergence is jsd, but for so many tokens .* the top k, .*forward_kl"):
        check_loss(config, top_k=True)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_end_the_job(
    config_file: Path, tiny_model: Path, tmp_path: Path, number: float
) -> None:
    folder = write_classifier(tmp_path / "broken", tiny_model)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias[0] = number
    model.save_pretrained(folder)
    with pytest.raises(TrainingError, match=r"the teacher's logits of the rows .* are not finite; set teacher.dtype"):
        fill(load_config(config_file, distilled(folder)).config)


def test_the_report_is_of_splits_and_bytes(tmp_path: Path) -> None:
    splits = {
        name: {"rows": rows, "labels": rows, "bytes": 9} for name, rows in (("train", 8), ("validation.other", 3))
    }
    totals = {"labels_in_all": 11, "bytes": 270, "bytes_per_label": 24.5, "share_of_whole_logits": 2.0, "seconds": 1.0}
    form = {"kept": "whole logits", "columns": 3, "top_k": None, "temperature": None, "dtypes": {}, "labels": []}
    form |= {"logit_scale": 1.0, "softcap": None, "layers": [], "hidden_widths": []}
    about = {"digest": "", "key": {}, "teacher": {}, "made_at": "", "shards": [], "splits": splits, "truncation": None}
    (line,) = report(tmp_path, Manifest.model_validate({**about, **form, **totals}))
    assert line == (
        f"{tmp_path}: train 8, other 3 rows, 11 labels, 270 bytes; 24.5 bytes a label, where 3 float32 logits take 12; "
        "computed in 1.0 s"
    )
