"""Two tokenizers are compared token by token; a classifier's teacher may read its own tokens, no other one."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from conftest import WORDS, forge, trainer_of
from conversations import config_on, conversation
from recorded_runs import write_run
from teachers import LABELS, write_chat_teacher, write_classifier
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from vocabularies import changed_vocabulary, sentencepiece, write_llm

from forge.config.loader import load_config
from forge.errors import UsageError
from forge.model.origin import Origin, WeightFiles
from forge.model.source import with_run_paths
from forge.task.load import load_task
from forge.teacher.vocabulary import compare, for_teacher
from forge.teacher_cache.key import content_key

Build = Callable[..., Any]
DISTIL = ("distillation.alpha=0.5", "evaluation.shown_texts=0")


@pytest.fixture
def bpe(chat_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture
def distil(tmp_path: Path, chat_model: Path) -> Build:
    """The task of a causal LM with what its teacher reads: distil(teacher's folder, "teacher.tokenizer=…", …)."""

    def make(teacher: Path, *settings: str) -> Any:
        rows = [conversation(i) for i in range(8)]
        config = config_on(tmp_path, chat_model, rows, rows[:2], *DISTIL, f"teacher.path={teacher}", *settings)
        return for_teacher(config, load_task(config))

    return make


def swapped(content: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    vocabulary = content["model"]["vocab"]
    for one, other in pairs:
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def renamed(content: dict[str, Any], old: str, new: str) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)


def longer(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_the_same_tokens_with_the_same_ids_are_one_vocabulary(bpe: PreTrainedTokenizerBase, chat_model: Path) -> None:
    assert compare(bpe, AutoTokenizer.from_pretrained(chat_model)) is None


def test_what_differs_is_told_with_ids_and_tokens_of_both(
    bpe: PreTrainedTokenizerBase, chat_model: Path, tmp_path: Path
) -> None:
    ids = bpe.get_vocab()
    pairs = [("a", "b"), ("c", "d")]
    other = changed_vocabulary(chat_model, tmp_path / "swapped", lambda content: swapped(content, pairs))
    a, b, c = (ids[letter] for letter in "abc")
    assert compare(bpe, other) == (
        f"4 of 304 common ids are different tokens ({a} is 'a' for the student and 'b' for the teacher, {b} is 'b' for "
        f"the student and 'a' for the teacher, {c} is 'c' for the student and 'd' for the teacher, …); the student's "
        "has 304 tokens and the teacher's 304"
    )
    one = changed_vocabulary(chat_model, tmp_path / "one", lambda content: renamed(content, "Ł", "日"))
    assert compare(bpe, one) == (
        f"1 of 304 common ids are different tokens ({ids['Ł']} is 'Ł' for the student and '日' for the teacher); the "
        "student's has 304 tokens and the teacher's 304"
    )
    more = longer(AutoTokenizer.from_pretrained(chat_model), "<tool>", "<end>")
    assert compare(bpe, more) == (
        "2 ids exist only in the teacher's (304 is '<tool>', 305 is '<end>'); the student's has 304 tokens and the "
        "teacher's 306"
    )
    assert compare(more, bpe) == (
        "2 ids exist only in the student's (304 is '<tool>', 305 is '<end>'); the student's has 306 tokens and the "
        "teacher's 304"
    )
    both = longer(other, "<tool>")
    assert "4 of 304 common ids" in str(compare(bpe, both))
    assert " and 1 id exists only in the teacher's (304 is '<tool>')" in str(compare(bpe, both))


def test_another_tokenizer_is_refused_with_what_differs_and_what_to_do(distil: Build, tmp_path: Path) -> None:
    teacher = write_llm(tmp_path / "teacher", sentencepiece(["red"]))
    with pytest.raises(UsageError) as refused:
        distil(teacher)
    words = str(refused.value)
    assert words.startswith("the teacher's tokenizer is not the student's: 2")
    assert "0 is '<|pad|>' for the student and '<unk>' for the teacher" in words
    assert words.endswith(
        "name a teacher with the student's tokenizer, or distillation.divergence: uld, which needs no common tokens"
    )
    with pytest.raises(UsageError, match=r"start the student with the teacher's \(model\.tokenizer: .*/teacher\), or"):
        distil(teacher, "model.config={model_type: llama, hidden_size: 8}", "model.new_tokenizer={kind: bpe}")


def test_only_the_comparison_in_evaluations_is_refused_too(distil: Build, chat_model: Path, tmp_path: Path) -> None:
    """At alpha 0 uld has no effect, and agreement is of equal tokens."""
    teacher = write_llm(tmp_path / "teacher", sentencepiece(["red"]))
    with pytest.raises(UsageError, match="the teacher's tokenizer is not the student's"):
        distil(teacher, "distillation.alpha=0", "evaluation.teacher=true")
    rows = [conversation(i) for i in range(8)]
    settings = (*DISTIL, f"teacher.path={teacher}", "distillation.divergence=uld")
    config = config_on(tmp_path, chat_model, rows, rows[:2], *settings)
    task = load_task(config)
    assert for_teacher(config, task).teacher_tokenizer is not None
    control = config.model_copy(update={"distillation": config.distillation.model_copy(update={"alpha": 0.0})})
    with pytest.raises(UsageError, match="the teacher's tokenizer is not the student's"):
        for_teacher(control, task)


def test_a_name_that_is_nothing_here_is_said_to_be_no_runs(distil: Build) -> None:
    for name, may_be_a_run in (("nosuchrun", True), ("someone/model", False)):
        with pytest.raises(UsageError) as refused:
            distil(Path(name))
        assert str(refused.value).startswith(f"teacher.path: {name} ")
        assert ("`forge runs`" in str(refused.value)) == may_be_a_run
        assert "teacher.tokenizer" not in str(refused.value)  # the whole teacher is missing


def test_a_runs_name_that_stands_twice_is_told_once(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "outputs" / "tiny" / "first")
    caplog.set_level(logging.INFO)
    config = with_run_paths(load_config(config_file, ["model.path=first", "teacher.path=first"]).config)
    assert (config.model.path, config.teacher.path) == (str(run.path), str(run.path))
    assert [record.message for record in caplog.records] == [f"first is the run {run.path}"]


def test_a_teacher_without_a_tokenizer_is_asked_for_one(distil: Build, chat_model: Path, tmp_path: Path) -> None:
    teacher = write_chat_teacher(tmp_path / "teacher", chat_model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / file).unlink()
    with pytest.raises(UsageError) as refused:
        distil(teacher)
    assert str(refused.value).startswith(f"teacher.path: the folder {teacher} has no usable tokenizer (")
    assert str(refused.value).endswith(
        "; the teacher's tokens are compared with the student's: name one with teacher.tokenizer"
    )
    task = distil(teacher, f"teacher.tokenizer={chat_model}")
    assert task.teacher_tokenizer is None
    assert task.same_tokens
    with pytest.raises(UsageError, match=r"teacher\.tokenizer: the folder .* name another"):
        distil(teacher, f"teacher.tokenizer={teacher}")


def test_other_special_tokens_and_another_way_to_cut_are_each_a_line(
    distil: Build, chat_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = write_chat_teacher(tmp_path / "teacher", chat_model)
    assert distil(teacher).teacher_tokenizer is None
    assert not [record for record in caplog.records if "tokenizer" in record.message]
    base = changed_vocabulary(chat_model, tmp_path / "base", lambda content: content["model"]["merges"].pop())
    base.eos_token = "<|endoftext|>"
    base.pad_token = "<|im_end|>"  # masked: of no interest
    base.save_pretrained(tmp_path / "base")
    distil(teacher, f"teacher.tokenizer={tmp_path / 'base'}")
    lines = [record.message for record in caplog.records if "tokenizer" in record.message]
    special, cut = lines
    assert "(eos is '<|im_end|>' for the student and '<|endoftext|>' for the teacher)" in special
    assert "another segmentation" in cut


def test_heads_of_other_widths_are_told_of_in_one_line(
    tmp_path: Path, chat_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [conversation(i) for i in range(8)]
    for columns, lines in ((None, []), (400, [[304, 400, 304, 304]])):
        caplog.clear()
        teacher = write_chat_teacher(tmp_path / f"teacher{columns}", chat_model, columns=columns)
        config = config_on(tmp_path, chat_model, rows, rows[:2], *DISTIL, f"teacher.path={teacher}")
        trainer_of(config, tmp_path)
        told = [record.message for record in caplog.records if "columns" in record.message]
        assert [[int(number) for number in re.findall(r"\d+", line)] for line in told] == lines


def word_pieces(words: list[str], letters: str = "abcdefghijklmnopqrstuvwxyz") -> PreTrainedTokenizerFast:
    """Cuts each word that is no token into letters; numbers its special tokens otherwise than the tiny model's."""
    tokens = ["<u>", *letters, *(f"##{letter}" for letter in letters), *words, "<c>", "<s>", "<p>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, vocabulary[token]) for token in ("<c>", "<s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<c> $A <s>", pair="<c> $A <s> $B:1 <s>:1", special_tokens=special
    )
    return PreTrainedTokenizerFast(
        **{"tokenizer_object": tokenizer, "unk_token": "<u>", "cls_token": "<c>", "sep_token": "<s>"},
        **{"pad_token": "<p>", "model_max_length": 64},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def write_stranger(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A BERT that teaches, with a tokenizer of its own and its labels in another order."""
    torch.manual_seed(7)
    config = BertConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.5},
        **{"pad_token_id": tokenizer.pad_token_id, "num_labels": 3},
        id2label={0: "contradiction", 1: "entailment", 2: "neutral"},
        label2id={"contradiction": 0, "entailment": 1, "neutral": 2},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    return write_stranger(tmp_path / "stranger", word_pieces(WORDS[::-2]))


def taught_by_hand(folder: Path, texts: list[dict[str, Any]], max_length: int) -> torch.Tensor:
    """(rows, 3): what the model in the folder says of each row alone, its labels in the order of LABELS."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    order = [model.config.label2id[name] for name in LABELS]
    logits = []
    for row in texts:
        pair = (row["text"], row["text_pair"])
        given = tokenizer(*pair, truncation="longest_first", max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            logits.append(model.eval()(**given).logits[0, order])
    return torch.stack(logits)


def test_a_classifiers_teacher_reads_its_own_tokens_of_the_same_rows(
    build_trainer: Build, stranger: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trainer = build_trainer(f"teacher.path={stranger}", "distillation.alpha=0.5", "task.max_length=24")
    task = trainer.task
    assert not task.same_tokens
    assert f"24 tokens a row, {task.teacher_truncated['train']} cut to 24 tokens" not in caplog.text
    assert f"{task.teacher_truncated['train']} cut to 24 tokens" in caplog.text
    assert 0 < task.teacher_truncated["train"] != task.truncated["train"]
    assert task.facts()["teacher_truncated"] == task.teacher_truncated
    trainer.batches.start_at(0)
    (batch,) = trainer.batches.next_step()  # rows in the order of a permutation
    ids = batch["ids"].tolist()
    assert ids != sorted(ids)
    outputs = trainer._teacher_outputs_in_training(batch)
    by_hand = taught_by_hand(stranger, [task.texts["train"][i] for i in ids], 24)
    own = [trainer.model.config.id2label[i] for i in range(3)]
    torch.testing.assert_close(outputs["logits"], by_hand[:, [LABELS.index(name) for name in own]])
    assert by_hand.std(0).min() > 0.1  # the rows are told apart

    split = task.validation["other"]
    batch = task.collate([split[i] for i in (6, 0, 3)])
    batch["positions"] = torch.arange(3)
    outputs = trainer.teacher.outputs(batch, "other", 1.0)
    by_hand = taught_by_hand(stranger, [task.texts["other"][i] for i in (6, 0, 3)], 24)
    torch.testing.assert_close(outputs["logits"], by_hand)


def test_a_classifiers_teacher_may_have_fewer_tokens_than_the_student(build_trainer: Build, tmp_path: Path) -> None:
    few = write_stranger(tmp_path / "few", word_pieces(["the", "dog", "no"], letters=""))
    trainer = build_trainer(f"teacher.path={few}", "distillation.alpha=0.5")
    assert trainer.teacher.model.config.vocab_size < trainer.model.config.vocab_size
    batch = trainer.task.collate([trainer.task.train[i] for i in (0, 2)]) | {"positions": torch.arange(2)}
    padding = batch["teacher_input_ids"][batch["teacher_attention_mask"] == 0]
    assert set(padding.tolist()) == {AutoTokenizer.from_pretrained(few).pad_token_id}
    by_hand = taught_by_hand(few, [trainer.task.texts["train"][i] for i in (0, 2)], 32)
    torch.testing.assert_close(trainer.teacher.outputs(batch, None, 1.0)["logits"], by_hand)


def test_a_run_with_such_a_teacher_has_the_rows_of_any_other_and_a_content_key_of_its_own(
    config_file: Path, stranger: Path, tmp_path: Path
) -> None:
    settings = ("--set", f"teacher.path={stranger}", "--set", "distillation.alpha=0.5")
    run = forge("--config", config_file, "--run_name", "kd", *settings)
    assert run.returncode == 0, run.stderr + run.stdout
    plain = load_config(config_file).config
    config = load_config(config_file, [f"teacher.path={stranger}", "distillation.alpha=0.5"]).config
    before = load_task(plain)
    task = for_teacher(config, before)
    assert task.fingerprint == before.fingerprint
    origin = Origin(WeightFiles(name="t", location=str(stranger), sha256="w"))
    assert content_key(config, task, origin, "float32") != content_key(config, before, origin, "float32")


def test_a_teacher_of_the_same_tokens_with_other_inputs_is_given_them(
    config_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A DistilBERT's tokenizer is BERT's without token types, which a BERT has learned to read."""
    student = tmp_path / "distilbert"
    shutil.copytree(tiny_model, student)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(student)
    config = DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=64)
    DistilBertModel(config).save_pretrained(student)
    teacher = write_classifier(tmp_path / "teacher", tiny_model)
    settings = [f"model.path={student}", f"teacher.path={teacher}", "distillation.alpha=0.5", "distillation.hidden={}"]
    trainer = trainer_of(load_config(config_file, settings).config, tmp_path)
    task = trainer.task
    assert task.same_tokens
    assert {name for name in task.train.column_names if name.startswith("teacher_")} == {
        "teacher_input_ids",
        "teacher_token_type_ids",
    }
    rows = [task.train[i] for i in (4, 1)]
    batch = task.collate(rows)
    assert "token_type_ids" not in batch
    assert torch.equal(batch["teacher_input_ids"], batch["input_ids"])
    batch["positions"] = torch.arange(2)
    by_hand = taught_by_hand(teacher, [task.texts["train"][i] for i in (4, 1)], 32)
    torch.testing.assert_close(trainer.teacher.outputs(batch, None, 1.0)["logits"], by_hand)

    same = for_teacher(load_config(config_file, settings[1:3]).config, load_task(load_config(config_file).config))
    assert same.teacher_tokenizer is None  # between two BERTs nothing is read twice
    other = changed_vocabulary(
        tiny_model, tmp_path / "other", lambda content: content.update(normalizer={"type": "NFC"})
    )
    assert other.backend_tokenizer.normalizer is not None
    also = [*settings[1:3], f"teacher.tokenizer={tmp_path / 'other'}"]
    same = for_teacher(load_config(config_file, also).config, load_task(load_config(config_file).config))
    assert same.teacher_tokenizer is None  # it would cut other texts otherwise, and none of these


@pytest.mark.parametrize(("name", "value"), [("truncation_side", "left"), ("model_input_names", ["input_ids"])])
def test_one_vocabulary_used_in_another_way_makes_other_inputs(
    config_file: Path, tiny_model: Path, tmp_path: Path, name: str, value: Any
) -> None:
    """Cut rows lose other tokens, or the teacher knows no segments."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    shutil.copy(tiny_model / "config.json", tmp_path / "teacher")
    settings = [f"teacher.path={tmp_path / 'teacher'}", "distillation.alpha=0.5", "task.max_length=8"]
    config = load_config(config_file, settings).config
    assert for_teacher(config, load_task(config)).teacher_tokenizer is not None


def test_terms_between_hidden_states_need_the_same_tokens(config_file: Path, stranger: Path) -> None:
    for term in ("hidden", "relations"):
        settings = [f"teacher.path={stranger}", "distillation.alpha=0.5", f"distillation.{term}={{}}"]
        config = load_config(config_file, settings).config
        with pytest.raises(UsageError) as refused:
            for_teacher(config, load_task(config))
        assert str(refused.value).startswith(
            f"distillation.{term} compares token by token, but the teacher's tokenizer"
        )
        assert "for the student and '<u>' for the teacher" in str(refused.value)


def test_rows_longer_than_the_teachers_tokenizer_takes_are_refused(config_file: Path, stranger: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stranger)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(stranger)
    config = load_config(config_file, [f"teacher.path={stranger}", "distillation.alpha=0.5"]).config
    with pytest.raises(UsageError, match=r"task\.max_length is 32, .* at most 16"):
        for_teacher(config, load_task(config))


@pytest.mark.parametrize("names", [[*LABELS, "unknown"], LABELS[:2], ["yes", "no", "maybe"]])
def test_a_teacher_of_other_labels_is_refused_in_the_words_of_its_section(
    build_trainer: Build, tiny_model: Path, tmp_path: Path, names: list[str]
) -> None:
    teacher = write_classifier(tmp_path / "teacher", tiny_model, names=names)
    with pytest.raises(UsageError) as refused:
        build_trainer(f"teacher.path={teacher}", "distillation.alpha=0.5")
    for part in (", ".join(LABELS), ", ".join(names), "task.labels", "teacher.labels"):
        assert part in str(refused.value)
    if len(names) == 3:
        trainer = build_trainer(
            f"teacher.path={teacher}", "distillation.alpha=0.5", f"teacher.labels=[{', '.join(LABELS)}]"
        )
        assert trainer.teacher.columns is None  # the same ones


def test_an_adapter_teaches_merged_into_its_base(tmp_path: Path, chat_model: Path) -> None:
    """Named itself, and by its run; without its base it is refused with the key that names one."""
    from transformers import AutoModelForCausalLM

    from forge.run.state import TrainingState, new_run_id

    base = write_chat_teacher(tmp_path / "base", chat_model)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    run = tmp_path / "run"
    run.mkdir()
    write_adapter(model, base, run / "final")
    TrainingState(run_id=new_run_id()).save(run / "training_state.json")
    rows = [conversation(i) for i in range(8)]
    weights = {}
    for path in (run / "final", run):
        config = config_on(tmp_path, chat_model, rows, rows[:2], *DISTIL, f"teacher.path={path}")
        trainer = trainer_of(config, tmp_path)
        batch = trainer.task.collate([trainer.task.train[0]])
        with torch.no_grad():
            expected = model(input_ids=batch["input_ids"]).logits
            given = trainer.teacher.model(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4)
        weights[path] = sorted(name for name, _ in trainer.teacher.model.named_parameters())
    assert not any("lora" in name for names in weights.values() for name in names)

    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"set teacher\.path to the adapter and teacher\.base to"):
        trainer_of(config, tmp_path)
    config = config_on(
        tmp_path, chat_model, rows, rows[:2], *DISTIL, f"teacher.path={run}", f"teacher.base={tmp_path / 'elsewhere'}"
    )
    assert trainer_of(config, tmp_path).teacher.model.config.hidden_size == 48
    config = config_on(tmp_path, chat_model, rows, rows[:2], *DISTIL, f"teacher.path={chat_model}", "teacher.base=x/y")
    with pytest.raises(UsageError, match=r"teacher\.base is x/y"):
        trainer_of(config, tmp_path)


def test_a_reader_is_taught_in_its_own_characters_and_told_of_other_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from test_ocr import TEXTS, TINY, write_images

    from forge.config.schema import Config
    from forge.task.ocr.characters import character_tokenizer
    from forge.task.ocr.line_reader import new_processor

    for split in ("train", "validation"):
        write_images(tmp_path / "lines" / split, TEXTS)

    def taught(texts: list[str], mean: float) -> Any:
        processor = new_processor(character_tokenizer(texts), TINY)
        processor.image_processor.image_mean = [mean]
        processor.save_pretrained(tmp_path / "teacher")
        (tmp_path / "teacher" / "config.json").write_text('{"model_type": "vision-encoder-decoder"}')
        config = Config.model_validate(
            {
                "task": {"type": "ocr", "dataset": {"path": str(tmp_path / "lines")}, "max_length": 16},
                "model": {"config": TINY, "new_tokenizer": {"kind": "characters"}},
                "teacher": {"path": str(tmp_path / "teacher")},
                "distillation": {"alpha": 0.5},
            }
        )
        return for_teacher(config, load_task(config))

    def warnings() -> list[str]:
        return [record.message for record in caplog.records if record.levelno >= logging.WARNING]

    assert taught(TEXTS, 0.9).teacher_tokenizer is None
    assert not warnings()
    taught(TEXTS, 0.5)
    (warning,) = warnings()
    assert "(image_mean is 0.9 for the student and 0.5 for the teacher)" in warning
    with pytest.raises(UsageError) as refused:
        taught([*TEXTS, "日"], 0.9)
    assert "1 id exists only in the teacher's (99 is '日'); the student's has 99 tokens and the" in str(refused.value)
    assert str(refused.value).endswith(f"start the student with the teacher's (model.tokenizer: {tmp_path}/teacher)")
