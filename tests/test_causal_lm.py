"""The causal LM task: what is learned of each kind of row, what is cut, its metrics, and whole runs."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, forge, forge_on_two_ranks
from conversations import END, LONG, LOST, config_on, conversation, labels_as_text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from forge.config.loader import load_config
from forge.config.schema import Config, ModelConfig, TrainingConfig
from forge.data.stream import RowStream
from forge.errors import UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.generation import end_with
from forge.task.causal_lm import metrics
from forge.task.causal_lm.bpe import train_bpe
from forge.task.causal_lm.metrics import generate_replies
from forge.task.causal_lm.task import CausalLm, load_causal_lm


def test_messages_are_learned_by_their_replies(load_lm: Any) -> None:
    task = load_lm([conversation(0), conversation(1, turns=2)], [conversation(2)])

    assert labels_as_text(task, list(task.train)) == [f"red 0{END}", f"green 1{END}blue 1{END}"]
    assert task.processing.decode(task.train[0]["input_ids"]) == (
        f"<|im_start|>user\nsay red 0{END}\n<|im_start|>assistant\nred 0{END}\n"
    )


def test_labels_are_where_the_logits_predict_them(load_lm: Any) -> None:
    task = load_lm([conversation(0), conversation(1, turns=2)], [conversation(2)])
    rows = list(task.train)
    batch = task.collate(rows)

    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["tokens"].item() == sum(len(row["input_ids"]) for row in rows) == batch["attention_mask"].sum()
    for b, row in enumerate(rows):
        for t, label in enumerate(batch["labels"][b].tolist()):
            if label != IGNORE:
                assert label == row["input_ids"][t + 1]
                assert row["learned"][t + 1]
    assert batch["labels"][0, rows[0]["length"] - 1 :].unique().tolist() == [IGNORE]
    assert batch["input_ids"][0, rows[0]["length"] :].unique().tolist() == [task.processing.pad_token_id]


def test_a_completion_is_learned_with_an_end_token_and_its_prompt_is_not(load_lm: Any) -> None:
    rows = [{"prompt": "say red:", "completion": " red"}]
    task = load_lm(rows, rows)

    assert task.encoder.form.name == "prompt_completion"
    assert task.processing.decode(task.train[0]["input_ids"]) == f"say red: red{END}"
    assert labels_as_text(task, list(task.train)) == [f" red{END}"]
    without = load_lm(rows, rows, "task.append_eos=false")
    assert labels_as_text(without, list(without.train)) == [" red"]


def test_prompt_and_completion_become_a_conversation_where_the_format_says_so(load_lm: Any) -> None:
    rows = [{"question": "say red", "answer": "red"}]
    columns = "task.columns={prompt: question, completion: answer}"
    task = load_lm(rows, rows, columns, "task.format=messages")

    assert labels_as_text(task, list(task.train)) == [f"red{END}"]
    assert task.processing.decode(task.train[0]["input_ids"]).startswith("<|im_start|>user\nsay red<|im_end|>")


def test_plain_text_is_learned_whole(load_lm: Any) -> None:
    task = load_lm([{"text": "one two three"}], [{"text": "cat"}])

    assert labels_as_text(task, list(task.train)) == [task.processing.decode(task.train[0]["input_ids"][1:])]
    assert task.processing.decode(task.train[0]["input_ids"]) == f"one two three{END}"


def test_a_tokenizer_that_writes_its_own_ends_is_given_none_twice(chat_model: Path, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|im_start|> $A {END}", special_tokens=[("<|im_start|>", 2), (END, end)]
    )
    tokenizer.save_pretrained(tmp_path / "own")
    rows = [{"prompt": "say red:", "completion": " red"}]
    task = load_causal_lm(config_on(tmp_path, chat_model, rows, rows, f"model.tokenizer={tmp_path / 'own'}"))

    assert task.processing.decode(task.train[0]["input_ids"]) == f"<|im_start|>say red: red{END}"
    assert labels_as_text(task, list(task.train)) == [f" red{END}"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
            "data, train: row 1 has the role assistant at the beginning (message 0) where system or developer or user "
            "belongs; its roles are assistant, user",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "data, train: row 1 ends with the role user and not with"),
        ({"messages": []}, "data, train: row 1 has no messages"),
        ({"messages": None}, "data, train: row 1 has no messages in the column messages; fill it in"),
    ],
)
def test_a_bad_row_is_named_with_its_split(load_lm: Any, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_lm([conversation(0), row], [conversation(1)])
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([{"words": "x"}], (), "there is no column messages, nor prompt with completion, nor text; it has: words"),
        ([{"text": "x"}], ("task.format=messages",), "there is no column messages, which task.format messages reads"),
        (
            [{"text": "x y"}],
            ("task.chat_template=t.jinja",),
            "task.chat_template writes messages, but the rows are read",
        ),
        ([{"prompt": "x", "completion": ""}], (), "train: row 0 has no text in the column completion; fill it in"),
        ([{"text": 3}], (), "train: row 0 has int where a text belongs (text)"),
        (
            [{"text": "x y"}],
            ("task.max_length=65",),
            "task.max_length is 65, but the tokenizer's model takes at most 64",
        ),
        (
            [{"text": "x y"}],
            ("model.new_tokenizer={kind: characters}", "model.config={model_type: llama}"),
            "model.new_tokenizer.kind is characters, but a causal LM needs kind: bpe",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(load_lm: Any, rows: Any, settings: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_lm(rows, rows, *settings)
    assert expected in str(refused.value)


def test_another_template_makes_other_data(load_lm: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
        "{% else %}A:{% generation %} {{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    rows = [conversation(0)]
    own, given = load_lm(rows, rows), load_lm(rows, rows, f"task.chat_template={file}")

    assert labels_as_text(given, list(given.train)) == [f" red 0{END}"]
    assert own.fingerprint != given.fingerprint
    assert own.fingerprint == load_lm(rows, rows).fingerprint
    assert given.processing.chat_template == file.read_text()  # it is saved with the model


def test_packed_training_rows_hold_the_same_labels_and_evaluation_stays_as_it_is(
    load_lm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [conversation(i, turns=1 + i % 2) for i in range(12)]
    plain, packed = load_lm(rows, rows[:3]), load_lm(rows, rows[:3], "task.packing=true")

    assert len(packed.train) < 12
    assert "position_ids" in packed.collate([packed.train[0]])
    assert "attention_mask" in packed.collate([packed.validation["validation"][0]])
    ours = torch.cat([packed.collate([row])["labels"].flatten() for row in packed.train])
    theirs = torch.cat([plain.collate([row])["labels"].flatten() for row in plain.train])
    assert sorted(ours[ours != IGNORE].tolist()) == sorted(theirs[theirs != IGNORE].tolist())
    assert packed.facts()["packed_rows"] == {"train": len(packed.train)}
    assert f"train: 12 rows are packed into {len(packed.train)} of up to 64 tokens" in caplog.text


def test_the_metrics_are_of_label_tokens_and_their_perplexity_is_that_of_the_loss(load_lm: Any) -> None:
    task = load_lm([conversation(0)], [conversation(1), conversation(2, turns=2)], "evaluation.shown_texts=0")
    loaded = task.load_model(config_of(task).model, config_of(task).training)
    metrics = task.metrics("validation", loaded.model)
    batch = task.collate(list(task.validation["validation"]))
    with torch.no_grad():
        logits = loaded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = batch["labels"] != IGNORE
    logs = logits.log_softmax(-1)[wanted].gather(1, batch["labels"][wanted][:, None])
    right = (logits.argmax(-1) == batch["labels"])[wanted]
    metrics.update({"ce_sum": -logs.sum(), "predictions": logits.argmax(-1)}, batch)

    found = metrics.compute()
    assert found["perplexity"] == pytest.approx(math.exp(-logs.mean().item()), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(right.double().mean().item())
    assert found["labels"] == wanted.sum().item()
    assert metrics.samples == []


def config_of(task: CausalLm) -> Config:
    """The config that a task was loaded with."""
    return load_config(Path(task.description).parent / "c.yaml", ()).config


def test_samples_are_what_the_model_generates_in_place_of_the_last_reply(load_lm: Any) -> None:
    task = load_lm([conversation(0)], [conversation(i, turns=1 + i % 2) for i in range(5)], "evaluation.shown_texts=3")
    model = task.load_model(config_of(task).model, config_of(task).training).model.eval()
    metrics = task.metrics("validation", model)
    metrics.counts += 1
    metrics.compute()

    assert [sample.row for sample in metrics.samples] == [0, 2, 4]
    assert [sample.reference for sample in metrics.samples] == ["red 0", "blue 2", "two 4"]
    assert metrics.samples[0].prompt == f"<|im_start|>user\nsay red 0{END}\n<|im_start|>assistant\n"
    tokenizer = task.processing
    for sample in metrics.samples:  # the rows are generated together, padded at the left: alone they are the same
        ids = tokenizer(sample.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert ids[0].tolist() == task.validation["validation"][sample.row]["input_ids"][: ids.shape[1]]
        ends = [tokenizer.eos_token_id]
        alone = model.generate(ids, max_new_tokens=19, do_sample=False, eos_token_id=ends, pad_token_id=0)
        assert tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True).strip()[:8] == sample.prediction[:8]


def test_the_reference_of_a_row_that_was_cut_after_its_last_reply_is_that_reply(load_lm: Any) -> None:
    messages = [*conversation(0)["messages"], {"role": "user", "content": "dog " * 60}, conversation(1)["messages"][1]]
    task = load_lm([conversation(0)], [{"messages": messages}])
    model = task.load_model(config_of(task).model, config_of(task).training).model.eval()
    (sample,) = generate_replies(model, task.processing, list(task.validation["validation"]))

    assert sample.reference == "red 0"
    assert sample.prompt.endswith("say red 0<|im_end|>\n<|im_start|>assistant\n")


def test_a_reply_is_no_longer_than_the_models_positions_and_its_reference_allow(
    load_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_lm([conversation(0)], [conversation(0)])
    model = task.load_model(config_of(task).model, config_of(task).training).model.eval()
    rows = list(task.validation["validation"])
    (sample,) = generate_replies(model, task.processing, rows)
    prompt = len(task.processing(sample.prompt, add_special_tokens=False).input_ids)
    asked: list[int] = []
    real = metrics.write
    monkeypatch.setattr(metrics, "write", lambda model, inputs, most: asked.append(most) or real(model, inputs, most))
    for positions in (1000, prompt + 3, prompt):  # there is always room for one token
        model.config.max_position_embeddings = positions
        generate_replies(model, task.processing, rows)
    assert asked == [rows[0]["length"] - prompt - 1 + metrics.SPARE_TOKENS, 3, 1]


def test_a_plain_text_is_continued_from_its_middle(load_lm: Any) -> None:
    rows = [{"text": "one two three cat dog bird"}]
    task = load_lm(rows, rows)
    model = task.load_model(config_of(task).model, config_of(task).training).model.eval()
    (sample,) = generate_replies(model, task.processing, list(task.train), plain_text=True)

    ids = task.train[0]["input_ids"]
    middle = len(ids) // 2
    assert sample.prompt == task.processing.decode(ids[:middle])
    assert sample.reference == task.processing.decode(ids[middle:-1]).strip()


def test_a_new_tokenizer_is_the_same_in_every_process() -> None:
    code = (
        "from forge.task.causal_lm.bpe import train_bpe; import hashlib\n"
        "from forge.data.demo.chat import demo_chat\n"
        "texts = [m['content'] for row in demo_chat('train', 300) for m in row['messages']]\n"
        "made = train_bpe(texts, 400, chat=True)\n"
        "print(hashlib.sha256(made.backend_tokenizer.to_str().encode()).hexdigest(), len(made))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={"PYTHONHASHSEED": seed, "PATH": "", "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, parallel in (("1", "false"), ("2", "true"))
    ]
    assert found[0] == found[1]
    assert found[0].split()[1] == "400"


def test_a_new_tokenizer_writes_every_text_and_stops_with_the_turn() -> None:
    tokenizer = train_bpe(["red green", "red blue"], 300, chat=True)

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.decode(tokenizer("  Größe 日本 👍🏽\n\t")["input_ids"]) == "  Größe 日本 👍🏽\n\t"
    assert [tokenizer.eos_token, tokenizer.pad_token] == [END, "<|pad|>"]
    assert train_bpe(["red"], 300, chat=False).eos_token == "<|endoftext|>"
    assert train_bpe(["red"], 300, chat=False).chat_template is None
    assert len(tokenizer("47")["input_ids"]) == 2


def test_a_run_from_scratch_with_packing_learns_and_its_model_answers(tmp_path: Path, chat_model: Path) -> None:
    rows = [conversation(i) for i in range(40)]
    config_on(tmp_path, chat_model, rows, rows[:8])
    scratch = (
        "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
        "max_position_embeddings: 96}"
    )
    settings = (f"model.config={scratch}", "model.new_tokenizer={kind: bpe, vocab_size: 330}", "task.packing=true")
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = forge("--config", tmp_path / "c.yaml", "--run_name", "r", "--max_steps", 12, *arguments)

    assert done.returncode == 0, done.stderr + done.stdout
    run = next((tmp_path / "outputs").rglob("run_metadata.json")).parent
    evaluations = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "stage" in row]
    before, after = (row["validation/ce"] for row in evaluations)
    assert after < before - 0.2
    assert evaluations[0]["validation/perplexity"] == pytest.approx(math.exp(before), rel=1e-4)
    assert evaluations[0]["validation/labels"] == evaluations[1]["validation/labels"] > 0
    model, tokenizer = (kind.from_pretrained(run / "final") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say red 0"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_a_stream_trains_on_its_rows_in_their_order(tmp_path: Path, chat_model: Path) -> None:
    rows = [*[conversation(i) for i in range(20)], LONG, LOST]
    config_on(tmp_path, chat_model, rows, rows[:8])
    done = forge("--config", tmp_path / "c.yaml", "--set", "task.dataset.streaming=true", "--max_steps", 3)

    assert done.returncode == 0, done.stderr + done.stdout
    run = next((tmp_path / "outputs").rglob("run_metadata.json")).parent
    reports = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "stage" not in row]
    assert [row.get("truncated") for row in reports] == [None, None, 2]
    assert [row["epoch"] for row in reports] == [0, 0, 1]


@pytest.mark.multiprocess
def test_two_ranks_take_the_steps_of_one_from_a_stream_and_from_packed_rows(tmp_path: Path, chat_model: Path) -> None:
    rows = [conversation(i, turns=1 + i % 3) for i in range(21)]
    config_on(tmp_path, chat_model, rows, rows[:5])
    found: dict[tuple[str, int], list[Any]] = {}
    for name in ("task.dataset.streaming", "task.packing"):
        for ranks, run in ((1, forge), (2, forge_on_two_ranks)):
            out = tmp_path / f"{name}-{ranks}"
            done = run("--config", tmp_path / "c.yaml", "--set", f"{name}=true", "--output_root", out)
            assert done.returncode == 0, done.stderr + done.stdout
            logged = [json.loads(line) for line in next(out.rglob("metrics.jsonl")).open()]
            found[name, ranks] = [row.get("loss", row.get("validation/ce")) for row in logged]
            assert len(found[name, ranks]) == 6  # four steps between two evaluations
        assert found[name, 2] == pytest.approx(found[name, 1], rel=1e-4)


def test_the_rows_of_a_stream_are_those_of_the_data_set(load_lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [conversation(0), LOST, LONG, conversation(3)]
    plain = load_lm(rows, rows[:1])
    stream = load_lm(rows, rows[:1], "task.dataset.streaming=true", "training.max_steps=2").train

    assert isinstance(stream, RowStream)
    raw = list(stream.rows)
    taken, truncated = stream.prepare(raw, list(range(4)))
    assert [row["input_ids"] for row in taken] == plain.train["input_ids"][:]
    assert [row["learned"] for row in taken] == plain.train["learned"][:]
    assert ([row["row"] for row in taken], truncated) == ([0, 2, 3], 2)
    (only,), lost = stream.prepare(raw[1:2], [1])
    assert (only["length"], only["learned"], only["row"], lost) == (1, [False], 1, 1)


def test_a_bad_row_of_a_stream_is_named(load_lm: Any) -> None:
    rows = [conversation(0), {"messages": [{"role": "user", "content": "x"}]}]
    stream = load_lm(rows, rows[:1], "task.dataset.streaming=true", "training.max_steps=2").train

    with pytest.raises(UsageError, match=r"data, train: row 1 ends with the role user"):
        stream.prepare(list(stream.rows), [0, 1])


def test_a_checkpoint_brings_its_own_tokenizer_instead_of_the_configs(load_lm: Any, chat_model: Path) -> None:
    rows = [conversation(i) for i in range(4)]
    task = load_lm(rows, rows, "model.new_tokenizer={kind: bpe, vocab_size: 330}")
    own = AutoTokenizer.from_pretrained(chat_model)
    assert task.processing.get_vocab() == own.get_vocab()
    load_lm(rows, rows, "model.new_tokenizer={kind: bpe}", "task.dataset.streaming=true", "training.max_steps=1")


def greedy(model: PreTrainedModel, prompt: list[int], ends: list[int], most: int) -> list[int]:
    """What the model generates after a prompt, token by token, without generate."""
    written: list[int] = []
    while len(written) < most and not set(written) & set(ends):
        written.append(int(model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1].argmax()))
    return written


def replies_of(task: CausalLm, model: PreTrainedModel) -> list[str]:
    return [
        sample.prediction for sample in generate_replies(model, task.processing, list(task.validation["validation"]))
    ]


def test_a_sample_is_greedy_and_stops_at_the_end_token_next_to_any_other_row(load_lm: Any) -> None:
    asked = [{"role": "user", "content": "say " * (1 + 4 * i)} for i in range(4)]
    rows = [{"messages": [question, *conversation(i)["messages"][1:]]} for i, question in enumerate(asked)]
    task = load_lm(rows, rows)
    model = task.load_model(config_of(task).model, config_of(task).training).model.eval()
    prompts = [row["input_ids"][: row["learned"].index(True)] for row in task.validation["validation"]]
    assert len({len(prompt) for prompt in prompts}) == 4
    most = max(map(sum, task.validation["validation"]["learned"])) + 16
    decode = task.processing.decode
    free = [greedy(model, prompt, task.ends, most) for prompt in prompts]
    assert replies_of(task, model) == [decode(ids, skip_special_tokens=True).strip() for ids in free]

    end_with(model, [free[1][2]], 0)  # as if the second text ended with its third token
    stopped = [greedy(model, prompt, [free[1][2]], most) for prompt in prompts]
    assert len(stopped[1]) <= 3
    assert replies_of(task, model) == [decode(ids, skip_special_tokens=True).strip() for ids in stopped]


def test_what_a_checkpoint_says_of_generation_changes_no_sample(load_lm: Any) -> None:
    task = load_lm([conversation(0)], [conversation(i) for i in range(3)])
    model = task.load_model(config_of(task).model, config_of(task).training).model.eval()
    expected = replies_of(task, model)
    odd = {"num_return_sequences": 2, "num_beams": 3, "repetition_penalty": 2.0, "min_new_tokens": 30, "min_length": 90}
    model.generation_config.update(**odd, no_repeat_ngram_size=1, max_new_tokens=1, bad_words_ids=[[5]])

    assert replies_of(task, model) == expected
    assert {name: getattr(model.generation_config, name) for name in odd} == odd


def test_the_model_ends_its_texts_with_the_tokens_that_end_its_rows(
    load_lm: Any, chat_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.eos_token = "<|endoftext|>"  # as of a base model, which is taught to end its turns
    tokenizer.save_pretrained(tmp_path / "base")
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", END])
    long = {"role": "assistant", "content": "<|im_start|>" * 60}  # is cut after such a token
    special = [conversation(1), {"messages": [*conversation(0)["messages"][:1], long]}]
    task = load_lm([conversation(0)], special, f"model.tokenizer={tmp_path / 'base'}")
    loaded = task.load_model(config_of(task).model, config_of(task).training)

    assert task.ends == loaded.model.generation_config.eos_token_id == sorted(ends)  # not <|im_start|>, a row's own
    assert load_lm([conversation(0)], [conversation(1)]).ends == ends[1:]


def test_an_adapter_and_its_merged_model_stop_where_its_samples_did(tmp_path: Path, chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", END])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [conversation(i) for i in range(8)]
    config_on(tmp_path, chat_model, rows, rows[:2])
    settings = (f"model.tokenizer={tmp_path / 'base'}", "model.lora={rank: 2}", "export.merge=true")
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = forge("--config", tmp_path / "c.yaml", "--max_steps", 1, *arguments)

    assert done.returncode == 0, done.stderr + done.stdout
    final = next((tmp_path / "outputs").rglob("run_metadata.json")).parent / "final"
    for folder in (final, final / "merged"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == sorted(ends)


def test_a_model_that_mixes_packed_rows_is_refused_as_student_and_taken_as_teacher(
    load_lm: Any, chat_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.save_pretrained(tmp_path / "opt")
    config = OPTConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    rows = [conversation(i) for i in range(4)]
    training = TrainingConfig()
    opt = ModelConfig(path=str(tmp_path / "opt"))

    packed = load_lm(rows, rows, "task.packing=true")
    with pytest.raises(UsageError, match=r"OPTForCausalLM .*; set task.packing: false"):
        packed.load_model(opt, training)
    assert packed.load_model(opt, training, "teacher").model.config.model_type == "opt"
    assert load_lm(rows, rows).load_model(opt, training).model.config.model_type == "opt"


def test_a_step_keeps_no_cache_of_keys_and_values(load_lm: Any) -> None:
    task = load_lm([conversation(0)], [conversation(1)])
    model = task.load_model(config_of(task).model, config_of(task).training).model
    batch = task.collate(list(task.train))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    assert model(**inputs).past_key_values is not None
    assert model(**inputs, **task.forward_options).past_key_values is None


def test_a_model_of_a_run_with_a_new_tokenizer_can_be_trained_on_longer_rows(load_lm: Any, tmp_path: Path) -> None:
    rows = [conversation(i) for i in range(4)]
    scratch = "{model_type: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4}"
    new = ("model.new_tokenizer={kind: bpe, vocab_size: 330}", f"model.config={scratch}", "task.max_length=48")
    load_lm(rows, rows, *new).save_processing(tmp_path / "own")

    longer = load_lm(rows, rows, f"model.tokenizer={tmp_path / 'own'}", "task.max_length=96")
    assert longer.config.max_length == 96
