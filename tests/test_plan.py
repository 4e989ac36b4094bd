"""`forge plan`: exact counts on models of a few numbers, what each plan shares, and what the command says."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from forge.cli.main import main
from forge.cli.plan import suggestion
from forge.config.loader import load_config
from forge.config.plans import read_plan
from forge.data.batches import model_inputs
from forge.memory import meta
from forge.memory.activations import step_bytes
from forge.memory.advice import DDP, Machine, advise, read_gpus, shardings_of, table_of
from forge.memory.meta import meta_job, running_job, student_on_meta
from forge.memory.totals import (
    GIB,
    RESERVED,
    Form,
    Job,
    Pass,
    RowBytes,
    Sharding,
    estimate_memory,
    fits,
    form_of,
    largest_rows,
    loss_bytes,
    loss_chunks,
)
from forge.model.load import LoadedModel
from forge.model.lora import with_lora
from forge.task.causal_lm.task import CausalLm

# Llama: V 300, D 8, 2 layers of 2 heads and 1 of keys, 4 wide each, I 16; the head is the embeddings.
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8
HEAD = 300 * 8
LLAMA = HEAD + 2 * LAYER + 8
LINEAR = 2 * (LAYER - 2 * 8)
CONFIG = """
task: {type: causal_lm, dataset: {demo: chat}, max_length: 6}
model:
  config:
    {model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2,
     num_key_value_heads: 1, head_dim: 4, tie_word_embeddings: true, max_position_embeddings: 64}
  new_tokenizer: {kind: bpe, vocab_size: 300}
training: {per_device_batch_size: 4, mixed_precision: bf16}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(CONFIG)
    return file


def job_on(file: Path, *settings: str) -> Job:
    """Counting takes a second, so the same config is counted once for all tests."""
    config = load_config(file, settings).config
    return _counted(config.model_dump_json(), lambda: meta_job(config))


_jobs: dict[str, Job] = {}


def _counted(key: str, count: Callable[[], Job]) -> Job:
    if key not in _jobs:
        _jobs[key] = count()
    return _jobs[key]


def with_plan(name: str | None, ranks: int = 4, teacher: str = "teacher_zero3") -> Sharding:
    return Sharding(None if name is None else read_plan(name), read_plan(teacher), ranks, ranks // 2)


def test_counts_of_a_model_without_weights(config_file: Path) -> None:
    sizes: Any = job_on(config_file).student
    assert (sizes.parameters, sizes.trained, sizes.linear) == (LLAMA, LLAMA, LINEAR)
    assert (sizes.head, sizes.columns, sizes.width, sizes.largest_layer) == (HEAD, 300, 8, LAYER)
    job = job_on(config_file)
    assert (job.tokens, job.labels, job.fused, job.uncounted) == (6, 6, True, "")


# In bf16 under DeepSpeed: 2 bytes a weight, 4 a gradient that is summed up, 12 of optimizer; a quarter where spread.
STATES = {
    None: (4 * LLAMA + 2 * LINEAR, 8 * LLAMA, 8 * LLAMA, 0, 0),
    "zero1": (2 * LLAMA, 4 * LLAMA, 12 * LLAMA // 4, 0, 0),
    "zero2": (2 * LLAMA, LLAMA, 3 * LLAMA, 2 * 2 * 200_000_000, 0),
    "zero2_offload": (2 * LLAMA, 0, 0, 2 * 2 * 200_000_000, 2 * 4 * LLAMA),
    "zero3": (2 * LLAMA // 4, LLAMA, 3 * LLAMA, 2 * 200_000_000 + 2 * LLAMA, 0),
    "zero3_offload": (0, 0, 0, 2 * 200_000_000 + 2 * LLAMA, 2 * (4 * LLAMA + 2 * LLAMA // 4)),
}


@pytest.mark.parametrize("plan", STATES)
def test_what_a_plan_shares(plan: str | None, config_file: Path) -> None:
    assert LLAMA % 4 == 0
    parts = estimate_memory(job_on(config_file), with_plan(plan))
    assert (parts.weights, parts.gradients, parts.optimizer, parts.buffers, parts.host) == STATES[plan]
    held = parts.weights + parts.gradients + parts.optimizer + parts.buffers + parts.activations + parts.loss
    assert parts.total == held
    assert parts.teacher == 0


def test_float32_has_no_copies_and_one_rank_no_buckets(config_file: Path) -> None:
    job = job_on(config_file, "training.mixed_precision=no")
    alone = estimate_memory(job, with_plan(None, ranks=1))
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * LLAMA, 4 * LLAMA, 8 * LLAMA)
    assert estimate_memory(job, with_plan("zero2")).weights == 4 * LLAMA


def test_of_an_adapter_only_its_own_weights_have_states(config_file: Path, chat_model: Path) -> None:
    base = [f"model.path={chat_model}", "model.lora.rank=2"]
    whole: Any = job_on(config_file, base[0]).student
    job = job_on(config_file, *base)
    sizes: Any = job.student
    config = json.loads((chat_model / "config.json").read_text())
    D, I = config["hidden_size"], config["intermediate_size"]  # noqa: E741
    keys = config["num_key_value_heads"] * D // config["num_attention_heads"]
    layer = 2 * (2 * D + 2 * (D + keys) + 2 * D + 3 * (D + I))  # rank * (in + out) of q, k and v, o, the MLP's three
    assert sizes.trained == layer * config["num_hidden_layers"]
    assert sizes.frozen == whole.parameters
    parts = estimate_memory(job, with_plan("zero2"))
    assert parts.optimizer == 12 * -(-sizes.trained // 4)
    assert parts.gradients == 4 * -(-sizes.trained // 4)
    assert parts.weights == 2 * (sizes.trained + sizes.frozen)
    assert job.activations
    assert job.activations != job_on(config_file, base[0]).activations


def test_a_classifiers_new_head_is_trained_beside_the_adapter(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "c.yaml"
    task = "{type: classification, dataset: {path: .}, labels: [a, b, c], max_length: 16}"
    file.write_text(f"task: {task}\nmodel: {{path: {tiny_model}, lora: {{rank: 2}}}}\n")
    sizes: Any = job_on(file).student
    adapters = 2 * (2 * (4 * (32 + 32) + 2 * (32 + 64)) + 32 + 32)  # two layers and the pooler
    assert sizes.trained == adapters + 32 * 3 + 3
    assert job_on(file).labels == 1


@pytest.mark.parametrize(
    ("placement", "plan", "teacher", "held", "host"),
    [
        ("replicated", None, "teacher_zero3", 2 * LLAMA, 0),
        ("offload", None, "teacher_zero3", 2 * (LAYER + HEAD), 2 * 2 * LLAMA),
        ("zero3", "zero1", "teacher_zero3", 2 * LLAMA // 4 + 2 * (LAYER + HEAD), 0),
        ("zero3", "zero1", "teacher_zero3_offload", 2 * (LAYER + HEAD), 2 * 2 * LLAMA // 4),
    ],
)
def test_the_teacher_in_its_placements(
    placement: str, plan: str | None, teacher: str, held: int, host: int, config_file: Path
) -> None:
    job = job_on(config_file)
    taught = replace(job, teacher=job.student, teacher_bytes=2, distils=True, placement=placement)
    taught = replace(taught, teacher_forward=RowBytes(0, 1))  # less than the student's step holds
    parts = estimate_memory(taught, with_plan(plan, teacher=teacher))
    hidden = 4 * 6 * 8 * 2  # rows, labels, width: what the loss is given
    assert (parts.teacher, parts.host) == (min(held, 2 * LLAMA) + hidden, host)
    assert replace(parts, teacher=0, host=0, loss=0) == replace(estimate_memory(job, with_plan(plan)), loss=0)


def test_a_teachers_forward_counts_where_it_holds_more_than_the_students_step(config_file: Path) -> None:
    job = replace(job_on(config_file), distils=True, teacher_bytes=2)
    taught = replace(job, teacher=job.student)
    step = estimate_memory(taught, with_plan(None))
    student = step.activations + step.loss
    more = estimate_memory(replace(taught, teacher_forward=RowBytes(student + 5, 10)), with_plan(None))
    assert more.teacher == step.teacher + 5 + 4 * 10  # four rows


def test_a_cached_teacher_costs_what_the_cache_gives(config_file: Path) -> None:
    job = replace(job_on(config_file), placement="cached", distils=True, top_k=64)
    estimate = estimate_memory(job, with_plan(None))
    assert estimate.teacher == 4 * 6 * 64 * 12  # rows, labels: an index and a logarithm each
    whole = replace(job, fused=False)
    assert estimate_memory(whole, with_plan(None)).teacher == 4 * 6 * 300 * 4
    assert estimate_memory(replace(job, distils=False), with_plan(None)).teacher == 0


def test_a_cached_teacher_need_not_be_here(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = ["teacher.path=/absent", "teacher.placement=cached", "distillation.alpha=0.5"]
    assert job_on(config_file, *cached).teacher is None
    words = [word for setting in cached for word in ("--set", setting)]
    assert main(["plan", str(config_file), "--gpus", "2x80", *words]) == 0
    assert "teacher: outputs read from files; cached" in capsys.readouterr().out


def test_a_teacher_in_memory_is_counted_with_its_forward(config_file: Path, chat_model: Path) -> None:
    job = job_on(config_file, f"teacher.path={chat_model}", "distillation.alpha=0.5", "task.max_length=64")
    assert job.teacher is not None
    assert job.teacher.trained == 0
    assert job.teacher_forward.per_row > 64 * job.teacher.width * 2
    assert job.teacher_forward.of(4) < estimate_memory(job, with_plan(None)).activations


def test_activations_grow_with_length_and_shrink_with_checkpointing(config_file: Path) -> None:
    job, longer = job_on(config_file), job_on(config_file, "task.max_length=48")
    assert set(job.activations) == {Pass(form, again) for form in (Form(4, 2), Form(2, 2)) for again in (False, True)}
    for each, line in job.activations.items():
        assert 7 * line.per_row < longer.activations[each].per_row < 24 * line.per_row
    for name, form in ((None, Form(4, 2)), ("zero1", Form(2, 2))):
        assert form_of(job, with_plan(name).plan) == form
        found = {again: estimate_memory(replace(job, checkpointing=again), with_plan(name)) for again in (False, True)}
        assert found[True].activations < found[False].activations
        assert found[False].activations == job.activations[Pass(form)].of(4)
    whole = job_on(config_file, "training.mixed_precision=no")
    assert set(whole.activations) == {Pass(Form(4, 4), again) for again in (False, True)}


def test_a_model_that_cannot_be_run_without_memory_says_so(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*given: Any, **named: Any) -> Any:
        raise RuntimeError("reads what it may not")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    job = meta_job(load_config(config_file).config)
    assert (job.activations, job.uncounted) == ({}, "RuntimeError: reads what it may not")
    assert main(["plan", str(config_file), "--gpus", "2x80"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "activations are not counted: LlamaForCausalLM cannot be run without memory (RuntimeError: reads" in out
    assert estimate_memory(job, with_plan(None)).weights == STATES[None][0]
    assert largest_rows(job, with_plan(None), 80 * GIB) == 0


@pytest.mark.parametrize("lora", [(), ("model.lora.rank=2",)])
def test_a_running_job_is_that_of_its_config(config_file: Path, chat_model: Path, lora: tuple[str, ...]) -> None:
    settings = (f"model.path={chat_model}", f"teacher.path={chat_model}", "training.mixed_precision=no", *lora)
    config = load_config(config_file, settings).config
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    if lora:
        model = with_lora(LoadedModel(model, None, [], []), config.model, 0).model
    before, drawn = {name: weight.clone() for name, weight in model.named_parameters()}, torch.get_rng_state()
    job = running_job(config, model, None, form=Form(4, 4, True), rows=3, longest=5)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert (job.rows, job.tokens, job.uncounted, job.student) == (3, 5, "", job_on(config_file, *settings).student)
    student = student_on_meta(config)
    inputs = model_inputs(CausalLm.planned_batch(config, config.model, student.config, 3, 5))
    each = Pass(Form(4, 4, True))
    expected = step_bytes(student, lambda rows: {**inputs, "use_cache": False}, each, 3).peak
    assert job.activations == {each: RowBytes(expected, 0)}
    taught = running_job(config, model, model, form=Form(4, 4, True), rows=3, longest=5)
    assert taught.teacher == taught.student
    assert taught.teacher_forward.per_row > 0


def test_the_loss_is_counted_with_the_budget_of_the_config(config_file: Path) -> None:
    form, rows = Form(4, 2), 1000
    found = {}
    for setting in ("low_memory=false", "low_memory=true", "memory_budget_gib=0.002"):
        job = job_on(config_file, f"training.loss.{setting}")
        chunks = loss_chunks(job, form, rows)
        found[setting] = (chunks.rows, chunks.wide, loss_bytes(job, form, rows))
    assert [wide for _, wide, _ in found.values()] == [6000, 2048, 1024]
    assert sorted(found.values(), key=lambda each: -each[2]) == list(found.values())


def test_buffers_of_the_loss(config_file: Path) -> None:
    job, form = job_on(config_file), Form(4, 2)
    N = 4 * 6
    head, hidden, copy = 300 * 8 * 4, N * 8 * 2 * 2, 300 * 8 * 2
    # One pass: N rows of logits of 320 columns, 4 bytes each, of which the head's gradient lends its memory; and bf16
    # gradients of the logits.
    assert loss_bytes(job, form, 4) == head + hidden + copy + max(0, N * 320 * 4 - head) + N * 320 * 2
    whole = replace(job, fused=False)
    assert loss_bytes(whole, form, 4) == N * 300 * (2 + 4 + 4 + 4 + 2)  # bf16, float32, softmax; gradients of both
    assert loss_bytes(whole, Form(4, 4), 4) == N * 300 * (4 + 4 + 4 + 4)


def test_logits_of_two_models(config_file: Path) -> None:
    job, rows = job_on(config_file), 2000  # more labels than go through the head at once
    taught = replace(job, teacher=job.student, distils=True, teacher_bytes=2)
    form = Form(2, 2)
    scratch = {"job": loss_bytes(job, form, rows), "bf16": loss_bytes(taught, form, rows)}
    scratch["float32"] = loss_bytes(replace(taught, teacher_bytes=4), form, rows)
    scratch["cached"] = loss_bytes(replace(taught, placement="cached", teacher=None), form, rows)
    chunk = loss_chunks(taught, form, rows).rows * 320
    assert scratch["job"] - scratch["bf16"] == 2 * chunk  # float32 logits of one model; differences in half precision
    assert scratch["float32"] - scratch["bf16"] == 6 * chunk  # float32 logits of both
    assert scratch["cached"] == scratch["job"]
    whole = replace(taught, fused=False)
    N = 4 * 6
    assert loss_bytes(whole, form, 4) == N * 300 * (2 + 4 + 4 + 4 + 2) + N * 300 * (
        2 + 4 + 4
    )  # the teacher's; gradients


def test_frozen_weights_in_4_bits(config_file: Path, chat_model: Path) -> None:
    lora = (f"model.path={chat_model}", "model.lora.rank=2")
    job, packed = job_on(config_file, *lora), job_on(config_file, *lora, "model.load_in_4bit=true")
    assert (job.student.in_4bit, packed.student.parameters) == (0, job.student.parameters)
    adapters = job.student.trained
    assert packed.student.in_4bit == packed.student.linear - adapters > 0
    saved = estimate_memory(job, with_plan("zero1")).weights - estimate_memory(packed, with_plan("zero1")).weights
    assert saved == pytest.approx((2 - 0.516) * packed.student.in_4bit, abs=1)
    assert estimate_memory(packed, with_plan(None)).weights < estimate_memory(job, with_plan(None)).weights


def test_the_teachers_dtype(config_file: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta, "row_bytes", lambda *given: {})  # activations take a second, and do not matter here
    monkeypatch.setattr(meta, "forward_bytes", lambda *given: RowBytes(0, 1))
    taught = (f"teacher.path={chat_model}", "distillation.alpha=0.5")

    def teacher_bytes(*settings: str) -> int:
        return meta_job(load_config(config_file, (*taught, *settings)).config).teacher_bytes

    assert teacher_bytes() == 2  # as training computes
    assert teacher_bytes("training.mixed_precision=no") == 4
    assert teacher_bytes("training.mixed_precision=no", "teacher.dtype=bfloat16") == 2
    assert teacher_bytes("teacher.dtype=float32") == 4


def test_the_largest_micro_batch_is_the_last_that_fits(config_file: Path) -> None:
    job, setting = replace(job_on(config_file), labels=6), with_plan("zero1")
    sizes = [estimate_memory(job, setting, rows).total for rows in range(1, 40)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    for rows in (1, 2, 3, 17, 38):
        assert largest_rows(job, setting, sizes[rows - 1] + RESERVED) == rows
        assert largest_rows(job, setting, sizes[rows] + RESERVED - 1) == rows
    assert largest_rows(job, setting, sizes[0] + RESERVED - 1) == 0
    capacities = [RESERVED + (1 << place) for place in range(14, 24)]
    found = [largest_rows(job, setting, capacity) for capacity in capacities]
    assert found == sorted(found)
    recomputed = [largest_rows(replace(job, checkpointing=True), setting, capacity) for capacity in capacities]
    assert all(more >= rows for more, rows in zip(recomputed, found, strict=True))


def again_job(job: Job, rows: int) -> Job:
    return replace(job, checkpointing=True, rows=rows)


def test_what_is_suggested_fits_and_is_the_nearest(config_file: Path) -> None:
    config = load_config(config_file).config
    job = replace(job_on(config_file), rows=64)
    machine = Machine(4, 80 * GIB)
    settings = shardings_of(config, machine)
    ample = advise(job, settings, machine)
    assert ample is not None
    assert (ample.plan, ample.settings, ample.rows) == (DDP, (), 64)
    chosen = advise(job, settings, machine, own="zero3")
    assert chosen is not None
    assert (chosen.plan, chosen.settings) == ("zero3", ())
    one_less = Machine(4, estimate_memory(job, settings[DDP]).total + RESERVED - 1)
    spread = advise(job, settings, one_less)
    assert spread is not None
    assert (spread.plan, spread.settings) == ("zero1", ("deepspeed.student=zero1",))
    tight = Machine(4, estimate_memory(again_job(job, 64), settings["zero1"]).total + RESERVED)
    again = advise(job, settings, tight)
    assert again is not None
    assert again.settings == ("deepspeed.student=zero1", "training.gradient_checkpointing=true")
    assert fits(again.estimate, tight.capacity)
    fewer = advise(job, settings, Machine(4, estimate_memory(again_job(job, 8), settings["zero1"]).total + RESERVED))
    assert fewer is not None
    assert (fewer.rows, fewer.settings) == (8, (*again.settings, "training.per_device_batch_size=8"))
    nothing = Machine(4, RESERVED)
    assert advise(job, settings, nothing) is None
    assert suggestion(job, nothing, None)[0].startswith("suggestion: nothing fits")
    assert [(row.fits, row.largest_rows) for row in table_of(job, settings, nothing)] == [(False, 0)] * len(settings)


def test_a_sharded_teacher_needs_a_plan(config_file: Path) -> None:
    job = job_on(config_file)
    taught = replace(job, teacher=job.student, placement="zero3", distils=True)
    machine = Machine(2, 80 * GIB)
    rows = {row.plan: row for row in table_of(taught, shardings_of(load_config(config_file).config, machine), machine)}
    assert (rows[DDP].fits, rows[DDP].refusal) == (False, "a zero3 teacher needs a plan")
    assert (rows["zero1"].fits, rows["zero1"].refusal) == (True, None)


def test_micro_batches_follow_the_step(config_file: Path) -> None:
    def rows(ranks: int, *settings: str) -> int:
        return load_config(config_file, settings).config.training.micro_batch_rows(ranks)

    assert rows(2) == 4
    assert rows(8, "training.batch_size=16") == 2
    assert rows(1, "training.batch_size=6") == 3  # two micro-batches of three


def test_the_command_prints_a_row_for_each_plan(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config_file), "--gpus", "2x80", "--nodes", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["trained_parameters"], found["frozen_parameters"]) == (LLAMA, LLAMA, 0)
    assert (found["gpus_per_node"], found["nodes"], found["gib_per_gpu"]) == (2, 2, 80)
    by_name = {plan["plan"]: plan for plan in found["plans"]}
    assert list(by_name) == [None, "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert by_name["zero2"]["buffers_gib"] == round(800_000_000 / GIB, 6)
    assert by_name["zero2_offload"]["host_gib"] == round(2 * 4 * LLAMA / GIB, 6)
    assert found["suggestion"]["plan"] is None

    assert main(["plan", str(config_file), "--gpus", "1x3", "--set", "training.gradient_checkpointing=true"]) == 0
    text = capsys.readouterr().out
    assert "student: LlamaForCausalLM, 0.0 M parameters" in text
    verdicts = {line.split()[0]: line.split()[-3] for line in text.splitlines() if line.startswith((" none", " zero"))}
    assert verdicts == {
        **{"none": "yes", "zero1": "yes", "zero2": "no", "zero2_offload": "no"},
        **{"zero3": "yes", "zero3_offload": "yes"},
    }
    assert "total: with the column recomputed" in text


@pytest.mark.parametrize("text", ["8", "8x", "x80", "0x80", "8x0", "8x-1", "8x80x2", "eight"])
def test_what_is_not_a_number_of_gpus_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "absent.yaml", "--gpus", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --gpus is {text!r}")
    assert error.endswith("such as 8x80\n")


def test_gpus_and_nodes() -> None:
    assert read_gpus("4x79.5", 3) == Machine(4, round(79.5 * GIB), 3)
    assert read_gpus("4x79.5", 3).ranks == 12


def test_help_and_a_wrong_word_need_no_torch(config_file: Path) -> None:
    code = (
        "import sys; from forge.cli.main import main\n"
        "for words in (['plan', '--help'], ['plan', 'x.yaml', '--gpus', '8x80', '--nodes', '0']):\n"
        "    try: main(words)\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "print('exit', main(['plan', 'x.yaml', '--gpus', '8y']))\n"
        f"print('exit', main(['plan', {str(config_file)!r}, '--gpus', '8x80', '--set', 'training.sed=1']))\n"
        "print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("exit")] == ["exit 0", "exit 2", "exit 2", "exit 2"]
    assert lines[-1] == "[]"
    assert "--nodes" in done.stderr
    assert "got '0'" in done.stderr
