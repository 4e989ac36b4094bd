"""What of the student's inside is drawn to the teacher's: against the models' own states, in any split of a step."""

import copy
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, forge, forge_on_two_ranks
from safetensors.torch import load_file, save_file
from test_trainer import trajectory
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from forge.config.teacher_schema import DistillationConfig
from forge.data.batches import FILLER, with_positions
from forge.errors import ConfigError, UsageError
from forge.losses.cross_entropy import IGNORE
from forge.model.attention import attention_modules, capture_outputs, width_of
from forge.proof.compare import compare_bits
from forge.run.files import read_json, read_json_lines
from forge.student.feature_terms import Features, build_features, layer_map
from forge.student.objective import Objective
from forge.student.student import Student
from forge.teacher.teacher import ModelTeacher

Build = Callable[..., Any]
LABELS = ["entailment", "neutral", "contradiction"]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
DISTIL: dict[str, Any] = {
    **{"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64},
    **{"initializer_range": 0.3, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": 3},
}


def classifier(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model


def bert(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return classifier(BertConfig(**{**SIZES, **changes}), seed)


def pairs_batch() -> dict[str, Tensor]:
    """Three rows of 7, 4 and 5 tokens, of which the last has no label."""
    torch.manual_seed(1)
    ids = torch.randint(4, 40, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[2, 5:] = 0
    labels = torch.tensor([2, 0, IGNORE])
    tokens = mask.sum()
    return with_positions({"input_ids": ids, "attention_mask": mask, "labels": labels, "tokens": tokens}, [0, 1, 2])


def taught(student: PreTrainedModel, teacher: PreTrainedModel, **terms: Any) -> tuple[Student, ModelTeacher]:
    """A student whose loss has the terms, in train mode, and its teacher."""
    config = DistillationConfig(**{"alpha": 0.5, **terms})
    placed = ModelTeacher(teacher.requires_grad_(False), {})
    placed.whole_logits = True
    features = build_features(config, 7, student, {}, placed, pairs_batch())
    return Student(student, {}, None, Objective(config), features).train(), placed


def losses_of(student: Student, teacher: ModelTeacher, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = student(batch, teacher.outputs(batch, None, 2.0))
    return result


def hidden_states(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        result = model.eval()(**inputs, output_hidden_states=True)
    return [states.double() for states in result.hidden_states]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_sum_is_the_rows_means_over_their_tokens_and_the_mean_over_the_pairs(kind: str) -> None:
    batch = pairs_batch()
    own, other = bert(0), classifier(DistilBertConfig(**{**DISTIL, "n_layers": 4, "dim": 24}), 1)
    student, teacher = taught(own, other, hidden={"kind": kind, "weight": 3.0, "layers": {2: 4, 0: 1}})
    plain, _ = taught(own, other, hidden=None)
    losses = losses_of(student, teacher, batch)

    assert student.projections is not None
    states, targets = hidden_states(own, batch), hidden_states(other, batch)
    total = 0.0
    for layer, of_teacher in ((0, 1), (2, 4)):
        weight = student.projections[f"{layer}_to_{of_teacher}"].weight.double()
        assert weight.shape == (24, 16)
        for row, tokens in ((0, 7), (1, 4)):  # the third has no label
            for t in range(tokens):
                vector, target = weight @ states[layer][row, t], targets[of_teacher][row, t]
                distance = (
                    ((vector - target) ** 2).mean()
                    if kind == "mse"
                    else 1 - (vector @ target) / (vector.norm() * target.norm())
                )
                total += distance.item() / tokens / 2
    assert losses["hidden_sum"].item() == pytest.approx(total, rel=1e-5)
    assert not losses["hidden_sum"].requires_grad
    without = losses_of(plain, teacher, batch)
    assert set(losses) - set(without) == {"hidden_sum"}
    expected = without["loss_sum"].item() + 3.0 * total
    assert losses["loss_sum"].item() == pytest.approx(expected, rel=1e-5)


def relations_by_hand(model: PreTrainedModel, modules: list[nn.Module], batch: dict[str, Tensor]) -> list[Tensor]:
    """(B, T, D) of each module, from its weight and what came in."""
    found: dict[int, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            linear: Any = module
            found[id(module)] = inputs[0].double() @ linear.weight.double().T + linear.bias.double()

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    hidden_states(model, batch)
    for hook in hooks:
        hook.remove()
    return [found[id(module)] for module in modules]


def test_relation_sum_is_the_divergence_of_the_layers_own_queries_keys_and_values() -> None:
    batch = pairs_batch()
    own, other = bert(0), classifier(DistilBertConfig(**{**DISTIL, "n_layers": 3, "dim": 24}), 1)
    terms = {"weight": 2.0, "heads": 4, "student_layer": 1, "teacher_layer": 2, "of": ["queries", "values"]}
    student, teacher = taught(own, other, relations=terms)
    losses = losses_of(student, teacher, batch)

    mine, theirs = own.bert.encoder.layer[0].attention.self, other.distilbert.transformer.layer[1].attention
    students = relations_by_hand(own, [mine.query, mine.value], batch)
    teachers = relations_by_hand(other, [theirs.q_lin, theirs.v_lin], batch)
    total = 0.0
    for s, t in zip(students, teachers, strict=True):
        for row, tokens in ((0, 7), (1, 4)):
            for head in range(4):
                logs = []
                for vectors, width in ((s, 4), (t, 6)):
                    x = vectors[row, :tokens, head * width : (head + 1) * width]
                    logs.append((x @ x.T / width**0.5).log_softmax(-1))
                total += (logs[1].exp() * (logs[1] - logs[0])).sum().item() / tokens / 4 / 2
    assert losses["relation_sum"].item() == pytest.approx(total, rel=1e-4)
    plain = losses_of(taught(own, other)[0], teacher, batch)
    assert losses["loss_sum"].item() == pytest.approx(plain["loss_sum"].item() + 2 * total, rel=1e-4)
    losses["loss_sum"].backward()
    assert mine.query.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize("last", [None, 2])
def test_nothing_is_drawn_where_the_teacher_is_the_student(last: int | None) -> None:
    own = bert(0)
    relations = {"heads": 4, "student_layer": last, "teacher_layer": last}
    student, teacher = taught(own, copy.deepcopy(own), hidden={}, relations=relations)
    losses = losses_of(student, teacher, pairs_batch())
    assert student.projections is None
    assert losses["hidden_sum"].item() == losses["relation_sum"].item() == 0.0


def test_rows_without_labels_and_padding_change_nothing() -> None:
    batch = pairs_batch()
    terms: dict[str, Any] = {"hidden": {"layers": {1: 1}}, "relations": {"heads": 2}}
    student, teacher = taught(bert(0), bert(1, hidden_size=24), **terms)
    together = losses_of(student, teacher, batch)
    alone = []
    for row, tokens in ((0, 7), (1, 4)):
        part = {name: batch[name][row : row + 1, :tokens] for name in ("input_ids", "attention_mask")}
        given = {**part, "labels": batch["labels"][row : row + 1], "tokens": batch["tokens"]}
        alone.append(losses_of(student, teacher, with_positions(given, [row])))
    for name in ("hidden_sum", "relation_sum", "loss_sum"):
        assert together[name].item() == pytest.approx(sum(one[name].item() for one in alone), rel=1e-5)

    first = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "labels")}
    nothing = losses_of(student, teacher, with_positions({**first, "tokens": batch["tokens"]}, [FILLER]))
    assert nothing["hidden_sum"].item() == nothing["relation_sum"].item() == nothing["loss_sum"].item() == 0.0
    student.zero_grad()
    nothing["loss_sum"].backward()
    trained = [parameter for name, parameter in student.named_parameters()]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)  # DDP waits for all


def test_labels_of_positions_weigh_their_hidden_states_alike() -> None:
    """Of a language model with a fused head; the last state is behind the final norm, in both."""

    def llama(seed: int, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        names = ("vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "initializer_range")
        config = {**{name: SIZES[name] for name in names}, "hidden_size": 16, "num_key_value_heads": 1, **changes}
        return LlamaForCausalLM(LlamaConfig(**config))

    from forge.model.head import LinearHead, find_head

    own, other = llama(0), llama(1, hidden_size=24, num_hidden_layers=4).eval()
    labels = torch.tensor([[5, 6, IGNORE, 9], [IGNORE, IGNORE, IGNORE, 3]])
    ids = torch.tensor([[4, 5, 6, 7], [9, 8, 7, 6]])
    batch = with_positions({"input_ids": ids, "labels": labels, "tokens": torch.tensor(8)}, [0, 1])
    options = {"use_cache": False}
    head, other_head = find_head(own, options), find_head(other, options)
    assert isinstance(head, LinearHead)
    assert isinstance(other_head, LinearHead)
    teacher = ModelTeacher(other.requires_grad_(False), options, head=other_head)
    config = DistillationConfig(alpha=0.5, hidden={"layers": {1: 2, 2: 4}})
    features = build_features(config, 7, own, options, teacher, batch)
    student = Student(own, options, head, Objective(config), features).train()
    losses = losses_of(student, teacher, batch)

    assert student.projections is not None
    states, targets = hidden_states(own, batch), hidden_states(other, batch)
    with torch.no_grad():
        assert torch.equal(states[2].float(), own.model(input_ids=ids).last_hidden_state)
    total = 0.0
    for layer, of_teacher in ((1, 2), (2, 4)):
        weight = student.projections[f"{layer}_to_{of_teacher}"].weight.double()
        for b, t in ((0, 0), (0, 1), (0, 3), (1, 3)):
            total += ((weight @ states[layer][b, t] - targets[of_teacher][b, t]) ** 2).mean().item() / 2
    assert losses["hidden_sum"].item() == pytest.approx(total, rel=1e-5)
    with pytest.raises(UsageError, match=r"compares encoders, .* the student, a LlamaForCausalLM"):
        attention_modules(own, None, "student")


@pytest.mark.parametrize("of_rows", [True, False])
def test_what_is_masked_out_may_be_nan_and_reaches_no_projection(of_rows: bool) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    labels = torch.tensor([1, 0]) if of_rows else torch.where(mask.bool(), 3, IGNORE)
    batch = with_positions({"labels": labels, "attention_mask": mask, "tokens": mask.sum()}, [0, 1])
    states, target = torch.randn(2, 4, 6), torch.randn(2, 4, 8)
    config = DistillationConfig(alpha=0.5, hidden={"layers": {1: 1}})

    def gradients(fill: float) -> tuple[float, Tensor, Tensor]:
        projections = nn.ModuleDict({"1_to_1": nn.Linear(6, 8, bias=False)})
        nn.init.constant_(projections["1_to_1"].weight, 0.25)  # type: ignore[arg-type]
        own = states.masked_fill(mask[..., None] == 0, fill).requires_grad_()
        told = {"hidden_states.1": target.masked_fill(mask[..., None] == 0, fill)}
        result = SimpleNamespace(hidden_states=(None, own))
        loss, _ = Features(config, {1: 1}, projections, {})(result, {}, batch, told)
        loss.backward()
        return loss.item(), own.grad, projections["1_to_1"].weight.grad  # type: ignore[return-value]

    loss, of_states, of_weight = gradients(float("nan"))
    expected, of_zeros, of_weight_at_zeros = gradients(0.0)
    assert loss == expected > 0
    assert torch.equal(of_states, of_zeros)
    assert torch.equal(of_weight, of_weight_at_zeros)
    assert of_weight.abs().sum() > 0


def test_only_positions_with_labels_go_through_a_projection() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[IGNORE, 3, IGNORE, 2], [IGNORE, IGNORE, IGNORE, 1]])
    batch = with_positions({"labels": labels, "tokens": torch.tensor(8)}, [0, 1])
    projection = nn.Linear(6, 8, bias=False)
    seen = []
    projection.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    own, told = torch.randn(2, 4, 6), {"hidden_states.1": torch.randn(2, 4, 8)}
    config = DistillationConfig(alpha=0.5, hidden={"layers": {1: 1}})
    Features(config, {1: 1}, nn.ModuleDict({"1_to_1": projection}), {})(
        SimpleNamespace(hidden_states=(None, own)), {}, batch, told
    )
    assert torch.equal(seen[0].flatten(0, -2), torch.stack([own[0, 1], own[0, 3], own[1, 3]]))


def test_of_an_encoder_decoder_the_decoders_states_are_drawn() -> None:
    def reader(seed: int, width: int, layers: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        decoder: dict[str, Any] = {
            **{"vocab_size": 20, "d_model": width, "decoder_layers": layers, "decoder_attention_heads": 2},
            **{"decoder_ffn_dim": 24, "max_position_embeddings": 16, "cross_attention_hidden_size": 8, "dropout": 0.0},
        }
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            ViTConfig(**sizes, image_size=8, patch_size=4), TrOCRConfig(**decoder)
        )
        return VisionEncoderDecoderModel(config)

    own, other = reader(0, 16, 2), reader(1, 24, 3).eval()
    labels = torch.tensor([[5, 6, IGNORE], [7, IGNORE, IGNORE]])
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 0]])}
    batch = with_positions({**inputs, "labels": labels, "tokens": torch.tensor(3)}, [0, 1])
    teacher = ModelTeacher(other.requires_grad_(False), {"use_cache": False})
    teacher.whole_logits = True
    config = DistillationConfig(alpha=0.5, hidden={"layers": {0: 0, 2: 3}})
    features = build_features(config, 7, own, {"use_cache": False}, teacher, batch)
    student = Student(own, {"use_cache": False}, None, Objective(config), features).train()
    hidden_sum = losses_of(student, teacher, batch)["hidden_sum"].item()

    assert student.projections is not None
    with torch.no_grad():
        mine, theirs = (m.eval()(**inputs, output_hidden_states=True).decoder_hidden_states for m in (own, other))
        total = torch.zeros(())
        for layer, of_teacher in ((0, 0), (2, 3)):
            drawn = mine[layer] @ student.projections[f"{layer}_to_{of_teacher}"].weight.T
            total += (drawn - theirs[of_teacher]).square().mean(-1)[labels != IGNORE].sum() / 2
    assert hidden_sum == pytest.approx(total.item(), rel=1e-5)


def test_the_default_map_spreads_the_students_layers_over_the_teachers() -> None:
    assert layer_map(None, 2, 6) == {0: 0, 1: 3, 2: 6}
    assert layer_map(None, 4, 6) == {0: 0, 1: 2, 2: 3, 3: 4, 4: 6}
    assert layer_map(None, 3, 2) == {0: 0, 1: 1, 2: 1, 3: 2}
    assert list(layer_map({2: 5, 1: 0}, 2, 6).items()) == [(1, 0), (2, 5)]


@pytest.mark.parametrize(("layers", "whose"), [({3: 1}, "student has no layer 3"), ({1: 7}, "teacher has no layer 7")])
def test_a_layer_that_there_is_not_is_refused(layers: dict[int, int], whose: str) -> None:
    with pytest.raises(UsageError, match=f"the {whose}: the student has 2 layers and the teacher 6"):
        layer_map(layers, 2, 6)


ARCHITECTURES: dict[str, tuple[PreTrainedConfig, str]] = {
    "bert": (BertConfig(**SIZES), "bert.encoder.layer.1.attention.self.query"),
    "roberta": (RobertaConfig(**SIZES), "roberta.encoder.layer.1.attention.self.query"),
    "electra": (ElectraConfig(**SIZES, embedding_size=8), "electra.encoder.layer.1.attention.self.query"),
    "distilbert": (DistilBertConfig(**DISTIL), "distilbert.transformer.layer.1.attention.q_lin"),
    "mpnet": (MPNetConfig(**SIZES), "mpnet.encoder.layer.1.attention.attn.q"),
    "deberta": (
        DebertaV2Config(
            **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8
        ),
        "deberta.encoder.layer.1.attention.self.query_proj",
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_queries_keys_and_values_are_found_by_their_names(name: str) -> None:
    config, query = ARCHITECTURES[name]
    model, batch = classifier(config).eval(), pairs_batch()
    modules = attention_modules(model, None, "student")
    assert modules["queries"] == query
    assert attention_modules(model, 1, "student") == {k: v.replace(".1.", ".0.") for k, v in modules.items()}
    assert [width_of(model, module) for module in modules.values()] == [16, 16, 16]
    with torch.no_grad(), capture_outputs(model, modules) as captured:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert {kind: tuple(vectors.shape) for kind, vectors in captured.items()} == dict.fromkeys(modules, (3, 7, 16))
    assert all(not model.get_submodule(module)._forward_hooks for module in modules.values())


def test_what_relations_cannot_compare_is_refused_by_name() -> None:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fused = classifier(ModernBertConfig(**{name: SIZES[name] for name in names}, pad_token_id=0))
    with pytest.raises(UsageError, match=r"the teacher, a ModernBert.* model.layers.1.attn.Wqkv"):
        taught(bert(), fused, relations={"heads": 2})
    shared = classifier(AlbertConfig(**SIZES, embedding_size=8))
    with pytest.raises(UsageError, match="each layer of the student, a AlbertForSequenceClassification; remove"):
        taught(shared, bert(), relations={"heads": 2})
    with pytest.raises(UsageError, match=r"teacher_layer is 3, but the teacher, a BertFor.*, has only 2 layers"):
        taught(bert(), bert(), relations={"heads": 2, "teacher_layer": 3})
    for width, whose in (
        ((16, 24), "16, the width of the student's queries"),
        ((24, 16), "16, the width of the teacher"),
    ):
        with pytest.raises(UsageError, match=f"heads is 12, which does not divide {whose}"):
            taught(*(bert(hidden_size=size) for size in width), relations={})


def test_projections_come_from_the_seed_alone_and_only_where_widths_differ() -> None:
    def build(seed: int) -> Features:
        config = DistillationConfig(alpha=0.5, hidden={"layers": {0: 1, 1: 1}})
        teacher = ModelTeacher(bert(1, hidden_size=24), {})
        features = build_features(config, seed, bert(0), {}, teacher, pairs_batch())
        assert features is not None
        return features

    torch.manual_seed(3)
    one = build(7)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    two, other = build(7), build(8)
    torch.manual_seed(4)
    assert torch.equal(torch.get_rng_state(), before)
    names = {"projections.0_to_1.weight", "projections.1_to_1.weight"}
    assert set(one.state_dict()) == names
    for name in names:
        assert torch.equal(one.state_dict()[name], two.state_dict()[name])
        assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    first, second = one.state_dict().values()
    assert not torch.equal(first, second)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 16**-0.5  # as nn.Linear's own
    student, _ = taught(bert(0), bert(1), hidden={})
    assert student.projections is None


def test_a_student_with_features_can_be_copied_and_pickled() -> None:
    batch = pairs_batch()
    student, teacher = taught(bert(0), bert(1, hidden_size=24), hidden={}, relations={"heads": 4})
    expected = losses_of(student, teacher, batch)["loss_sum"].item()
    assert losses_of(copy.deepcopy(student), teacher, batch)["loss_sum"].item() == expected
    # With hidden states, the hooks of transformers itself would be in the way.
    student, teacher = taught(bert(0), bert(1, hidden_size=24), relations={"heads": 4})
    expected = losses_of(student, teacher, batch)["loss_sum"].item()
    assert losses_of(pickle.loads(pickle.dumps(student)), teacher, batch)["loss_sum"].item() == expected


def test_an_evaluation_asks_for_no_features() -> None:
    student, teacher = taught(bert(0), bert(1), hidden={}, relations={"heads": 4})
    batch = pairs_batch()
    asked = teacher.outputs(batch, None, 1.0)
    states = {f"hidden_states.{layer}" for layer in range(3)}
    assert set(asked) == {"logits", *states, "relations.queries", "relations.keys", "relations.values"}
    assert set(teacher.outputs(batch, "matched", 1.0)) == {"logits"}
    assert set(student.eval()(batch, asked)) == {"ce_sum", "predictions", "confidences", "kl_sum", "agreed"}


# In the loop, on the tiny data.


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A BERT of three layers, wider than the tiny one, as somebody has fine-tuned it."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    torch.manual_seed(5)
    config = BertConfig(
        **{**SIZES, "vocab_size": len(tokenizer), "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def build(build_trainer: Build, teacher_folder: Path) -> Build:
    """A trainer whose student is drawn to the teacher inside."""

    def built(*settings: str) -> Any:
        terms = ("distillation.hidden.weight=0.5", "distillation.relations.heads=4", "distillation.relations.weight=2")
        return build_trainer(f"teacher.path={teacher_folder}", "distillation.alpha=0.5", *terms, *settings)

    return built


def projections_of(trainer: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trainer.training.projections.state_dict().items()}


def test_a_step_is_the_same_however_it_is_split(build: Build) -> None:
    whole = build("training.per_device_batch_size=8")
    begun = projections_of(whole)
    losses, weights = trajectory(whole)
    assert set(begun) == {"0_to_0.weight", "1_to_2.weight", "2_to_3.weight"}
    reports = whole.attempt.callbacks.reports
    for report in reports:
        assert min(report["hidden"], report["relation"]) > 0
        parts = 0.5 * report["ce"] + 0.5 * 4 * report["divergence"] + 0.5 * report["hidden"] + 2 * report["relation"]
        assert report["loss"] == pytest.approx(parts, rel=1e-5)
    assert reports[-1]["hidden"] < reports[0]["hidden"]
    ended = projections_of(whole)
    assert all((ended[name] - begun[name]).abs().max() > 1e-3 for name in begun)
    for size in (1, 3):
        split = build(f"training.per_device_batch_size={size}")
        split_losses, split_weights = trajectory(split)
        assert split_losses == pytest.approx(losses, rel=1e-5)
        assert split_weights == pytest.approx(weights, abs=1e-5)
        for key in ("hidden", "relation"):
            own = [report[key] for report in split.attempt.callbacks.reports]
            assert own == pytest.approx([report[key] for report in reports], rel=1e-4)
        for name, weight in projections_of(split).items():
            torch.testing.assert_close(weight, ended[name], rtol=0, atol=1e-5)


def test_projections_are_clipped_and_decay_with_the_other_matrices(build: Build) -> None:
    trainer = build("training.max_steps=1")
    (decayed, spared) = trainer.optimizer.param_groups
    own = list(trainer.training.projections.parameters())
    assert all(any(weight is other for other in decayed["params"]) for weight in own)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(trainer.model.parameters())) + 3


@pytest.mark.parametrize("settings", [(), ("model.lora.rank=4",), ("training.gradient_checkpointing=true",)])
def test_a_restored_training_ends_with_the_same_projections(settings: tuple[str, ...], build: Build) -> None:
    settings = ("model.dropout=0.1", "training.max_steps=4", "checkpoint.every_steps=2", *settings)
    unbroken = build(*settings)
    losses, weights = trajectory(unbroken)
    ended = projections_of(unbroken)
    folder = unbroken.attempt.run.path / "checkpoint-2"
    assert "projections.safetensors" in read_json(folder / "manifest.json")["files"]

    resumed = build(*settings)
    resumed.restore(folder)
    saved = load_file(folder / "projections.safetensors")
    for name, weight in projections_of(resumed).items():
        assert torch.equal(weight, saved[name])
        assert not torch.equal(weight, ended[name])
    more, resumed_weights = trajectory(resumed)
    assert more == losses[2:]
    assert resumed_weights == weights
    for name, weight in projections_of(resumed).items():
        assert torch.equal(weight, ended[name])


def test_gradient_checkpointing_changes_no_number(build: Build) -> None:
    losses, weights = trajectory(build())
    recomputed_losses, recomputed_weights = trajectory(build("training.gradient_checkpointing=true"))
    assert recomputed_losses == pytest.approx(losses, rel=1e-6)
    assert recomputed_weights == pytest.approx(weights, abs=1e-6)


def test_an_offloaded_teacher_tells_the_same(build: Build) -> None:
    losses, weights = trajectory(build())
    assert trajectory(build("teacher.placement=offload")) == (losses, weights)


def test_bf16_computes_the_terms_in_float32(build: Build) -> None:
    plain = build()
    trajectory(plain)
    trainer = build("training.mixed_precision=bf16")
    seen = []
    (projection, *_) = trainer.training.projections.values()
    projection.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trajectory(trainer)
    assert set(seen) == {torch.float32}
    for key in ("hidden", "relation"):
        values, others = ([report[key] for report in t.attempt.callbacks.reports] for t in (trainer, plain))
        assert values == pytest.approx(others, rel=0.1)


def test_alpha_0_builds_nothing_and_trains_as_without_a_teacher(
    config_file: Path, teacher_folder: Path, build_trainer: Build
) -> None:
    plain = trajectory(build_trainer())
    terms = "{alpha: 0.5, hidden: {weight: 2.0}, relations: {heads: 4}}"
    config_file.write_text(f"{config_file.read_text()}teacher: {{path: {teacher_folder}}}\ndistillation: {terms}\n")
    trainer = build_trainer("distillation.alpha=0", "evaluation.teacher=true")
    assert trainer.student.features is None
    assert trainer.training.projections is None
    assert trajectory(trainer) == plain
    assert not list(trainer.attempt.run.path.rglob("projections.safetensors"))


def test_a_checkpoint_of_other_projections_is_refused(build: Build, tmp_path: Path) -> None:
    trainer = build()
    trainer.train()
    folder = trainer.attempt.run.path / "checkpoint-3"
    with pytest.raises(UsageError, match=r"projections\.safetensors holds projections of hidden"):
        build("distillation.hidden=null").restore(folder)
    fewer = build("distillation.hidden.layers={1: 2}")
    with pytest.raises(UsageError, match="does not fit the projections that are trained now"):
        fewer.restore(folder)
    (folder / "projections.safetensors").unlink()
    with pytest.raises(
        UsageError, match=r"checkpoint-3 has no projections.safetensors, but distillation.hidden trains"
    ):
        build().restore(folder)


BAD_INPUT = {
    "layers={3: 1}": "the student has no layer 3: the student has 2 layers and the teacher 3",
    "layers={1: 4}": "the teacher has no layer 4: the student has 2 layers and the teacher 3",
    "layers={-1: 1}": "layers.-1.[key] is -1; it must be at least 0",
    "layers={}": "distillation.hidden.layers has no entries; it needs at least 1",
}


@pytest.mark.parametrize("setting", BAD_INPUT)
def test_layers_that_there_are_not_are_refused(setting: str, build_trainer: Build, teacher_folder: Path) -> None:
    with pytest.raises((UsageError, ConfigError)) as refused:
        build_trainer(f"teacher.path={teacher_folder}", "distillation.alpha=0.5", f"distillation.hidden.{setting}")
    assert BAD_INPUT[setting] in str(refused.value)


def test_bad_relations_exit_2_and_create_nothing(config_file: Path, teacher_folder: Path, tmp_path: Path) -> None:
    command = job(config_file, teacher_folder)
    done = forge(*command, "--set", "distillation.relations.heads=5")
    assert done.returncode == 2
    assert "distillation.relations.heads is 5, which does not divide 32, the width of the student's" in done.stderr
    assert not list((tmp_path / "outputs").glob("*/*"))


def job(config_file: Path, teacher_folder: Path) -> list[Any]:
    settings = [f"teacher.path={teacher_folder}", "distillation.alpha=0.5", "distillation.hidden.layers={1: 2, 2: 3}"]
    settings += ["distillation.relations.heads=4", "training.batch_size=10", "training.per_device_batch_size=4"]
    return ["--config", config_file, *(part for setting in settings for part in ("--set", setting))]


@pytest.mark.usefixtures("warm_starts")
def test_a_killed_job_ends_as_the_unbroken_one_and_exports_no_projections(
    config_file: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    """Through the true command: the map of layers comes back from the recorded config as it was."""
    command = [*job(config_file, teacher_folder), "--max_steps", 8, "--set", "checkpoint.every_steps=2"]
    whole = forge(*command, "--run_name", "whole")
    assert whole.returncode == 0, whole.stderr
    runs = tmp_path / "outputs" / "tiny"
    killed = [sys.executable, "forge.py", *map(str, command), "--run_name", "killed"]
    process = subprocess.Popen(killed, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((runs / "killed").glob("checkpoint-*")):  # polled: there is nothing else to wait for
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = forge("--resume", runs / "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "changed:" not in resumed.stderr + resumed.stdout
    comparison = compare_bits(runs / "whole", runs / "killed")
    assert comparison.difference is None
    assert {path.name for path in (runs / "whole" / "final").glob("*.safetensors")} == {"model.safetensors"}

    file = runs / "killed" / "checkpoint-8" / "projections.safetensors"
    tensors = load_file(file)
    assert set(tensors) == {"1_to_2.weight", "2_to_3.weight"}
    tensors["2_to_3.weight"][3, 1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    difference = compare_bits(runs / "whole", runs / "killed").difference
    assert difference is not None
    assert (difference.part, difference.where) == (
        "model",
        "checkpoint-8/projections.safetensors: 2_to_3.weight[3, 1]",
    )


@pytest.mark.multiprocess
def test_two_ranks_take_the_same_steps_as_one(config_file: Path, teacher_folder: Path, tmp_path: Path) -> None:
    command = job(config_file, teacher_folder)
    alone = forge(*command, "--run_name", "alone")
    both = forge_on_two_ranks(*command, "--run_name", "both")
    assert alone.returncode == 0, alone.stderr
    assert both.returncode == 0, both.stderr
    runs = tmp_path / "outputs" / "tiny"
    one, two = ([r for r in read_json_lines(runs / n / "metrics.jsonl") if "grad_norm" in r] for n in ("alone", "both"))
    for key, precision in (("loss", 1e-5), ("hidden", 1e-5), ("relation", 1e-4), ("grad_norm", 1e-4)):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=precision)
    for file in ("final/model.safetensors", "checkpoint-6/projections.safetensors"):
        weights, others = (load_file(runs / name / file) for name in ("alone", "both"))
        for name, weight in weights.items():
            assert (weight - others[name]).abs().max() < 1e-5, name
