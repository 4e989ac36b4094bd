"""The loss of a student is the model's own, with its head fused or not; its predictions are the argmax labels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_oracle import sparse_kl
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from forge.config.schema import LossConfig
from forge.config.teacher_schema import DistillationConfig
from forge.losses.cross_entropy import IGNORE
from forge.losses.kd_arguments import Computing, Formula, HeadInput, KDLoss
from forge.losses.linear_kd import linear_kd
from forge.model.adapter import attach
from forge.model.head import LinearHead, find_head
from forge.student.evaluation import CALIBRATION_BINS, _calibrate
from forge.student.objective import Objective, tied_for_argmax
from forge.student.student import Student
from forge.teacher.teacher import ModelTeacher

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gemma 2 with a softcap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "granite with divided logits": GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere with scaled logits": CohereConfig(**SIZES, logit_scale=0.25),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (3, 9))
    labels = torch.randint(0, 50, (3, 9))
    labels[0, :6] = labels[2, 3:] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "ids": torch.arange(3)}


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_head_gives_the_loss_gradients_and_predictions_of_whole_logits(name: str, positions: bool) -> None:
    given = batch()
    plain = Student(build(CONFIGS[name]), {"use_cache": False})
    expected = plain(given)
    logits = plain.model(input_ids=given["input_ids"], use_cache=False).logits
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), reduction="sum")
    assert expected["loss_sum"].item() == pytest.approx(own.item(), rel=1e-5)
    expected["loss_sum"].backward()

    model = build(CONFIGS[name])
    head = find_head(model, {"use_cache": False})
    assert isinstance(head, LinearHead)
    fused = Student(model, {"use_cache": False}, head)
    counted = (given["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    given |= {"positions": counted} if positions else {}
    outputs = fused(given)
    outputs["loss_sum"].backward()

    assert set(outputs) == {"loss_sum"}
    assert outputs["loss_sum"].item() == pytest.approx(expected["loss_sum"].item(), rel=1e-6)
    for (key, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=2e-5, atol=1e-6, msg=key)
    plain.eval(), fused.eval()
    with torch.no_grad():
        found, others = plain(given)["predictions"], fused(given)["predictions"]
    assert others.shape == (3, 9)
    assert found.flatten()[counted].tolist() == others.flatten()[counted].tolist()


def test_a_head_that_is_more_than_a_matrix_is_not_fused() -> None:
    model = build(CONFIGS["llama"])
    attach(model, LoraConfig(target_modules=["q_proj"]))
    assert isinstance(find_head(model, {}), LinearHead)
    model = build(CONFIGS["llama"])
    attach(model, LoraConfig(target_modules=["lm_head"]))
    assert find_head(model, {}) == "its head is peft.tuners.lora.layer.Linear"
    odd = build(CONFIGS["gemma 2 with a softcap"])
    original = odd.forward
    odd.forward = lambda **inputs: _doubled(original(**inputs))
    assert str(find_head(odd, {})).startswith("Gemma2ForCausalLM ")


def _doubled(output):  # type: ignore[no-untyped-def]
    output.logits = output.logits * 2
    return output


def test_a_batch_without_labels_still_gives_every_weight_a_gradient() -> None:
    """A rank with nothing to do must take part in DDP's reduction."""
    model = build(CONFIGS["llama"])
    head = find_head(model, {})
    assert isinstance(head, LinearHead)
    given = batch()
    given["labels"] = torch.full_like(given["labels"], IGNORE)
    given["positions"] = torch.zeros(0, dtype=torch.int64)
    outputs = Student(model, {}, head)(given)
    outputs["loss_sum"].backward()
    assert outputs["loss_sum"].item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_head_with_a_bias_counts_it() -> None:
    model = build(CONFIGS["llama"])
    model.lm_head.bias = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    head = find_head(model, {})
    assert isinstance(head, LinearHead)
    plain, fused = Student(model)(batch()), Student(model, {}, head)(batch())
    assert fused["loss_sum"].item() == pytest.approx(plain["loss_sum"].item(), rel=1e-6)


def test_the_argmax_does_not_depend_on_mixed_precision() -> None:
    """Among 20,000 logits in bf16 many are equal."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 20_000, bias=False)
    given = {"labels": torch.zeros(1, 200, dtype=torch.int64), "hidden": torch.randn(1, 200, 64)}
    body = lambda hidden: SimpleNamespace(last_hidden_state=hidden.bfloat16().float())  # noqa: E731
    student = Student(torch.nn.Identity(), {}, LinearHead(body, linear)).eval()
    with torch.no_grad():
        exact = student(given)["predictions"]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(student(given)["predictions"], exact)


def small(name: str, seed: int) -> PreTrainedModel:
    """One of CONFIGS with its own weights, in float64, with a bias on its head."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    return model


PAIRS = [
    ("gemma 2 with a softcap", "granite with divided logits"),
    ("cohere with scaled logits", "gemma 2 with a softcap"),
    ("granite with divided logits", "cohere with scaled logits"),
]


def own_logits(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model itself makes of the batch at its labels, (N, 50) float64."""
    logits: torch.Tensor = model(input_ids=given["input_ids"], use_cache=False).logits
    return logits.flatten(0, 1)[given["positions"]]


@pytest.mark.parametrize(("name", "teacher_name"), PAIRS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "uld"])
def test_scales_softcaps_and_biases_of_both_are_in_the_loss(name: str, teacher_name: str, divergence: str) -> None:
    """From hidden states and heads, against the whole logits that the two models give themselves."""
    model, other = small(name, 0), small(teacher_name, 8).requires_grad_(False)
    heads = [find_head(one, {"use_cache": False}) for one in (model, other)]
    assert all(isinstance(head, LinearHead) for head in heads)
    given = batch()
    given["positions"] = (given["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    given["aligned"] = given["teacher_aligned"] = given["positions"]
    given |= {"teacher_input_ids": given["input_ids"]} if divergence == "uld" else {}
    told = ModelTeacher(other, {"use_cache": False}, head=heads[1])
    config = DistillationConfig(alpha=0.6, temperature=2.0, divergence=divergence)
    student = Student(model, {"use_cache": False}, heads[0], Objective(config, told.logit_scale, told.softcap)).train()
    outputs = told.outputs(given, None, 2.0)
    assert "logits" not in outputs
    assert "head_bias" in outputs
    sums = student(given, outputs)
    sums["loss_sum"].backward()
    gradients = {key: weight.grad.clone() for key, weight in model.named_parameters()}

    model.zero_grad()
    z, y = own_logits(model, given), own_logits(other, given)
    ce = torch.nn.functional.cross_entropy(z, given["labels"].flatten()[given["positions"]], reduction="sum")
    p, q = (z / 2).softmax(-1), (y / 2).softmax(-1)
    if divergence == "uld":
        expected = (p.sort(descending=True).values - q.sort(descending=True).values).abs().sum()
    else:
        expected = (p * (p.log() - q.log())).sum()
    assert sums["ce_sum"].item() == pytest.approx(ce.item(), rel=1e-9)
    assert sums["divergence_sum"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert expected > 0.1
    if divergence == "uld":  # whose gradient is 0 where two probabilities are nearly equal
        assert sums["loss_sum"].item() == pytest.approx((0.4 * ce + 0.6 * 4 * expected).item(), rel=1e-9)
        return
    (0.4 * ce + 0.6 * 4 * expected).backward()
    for key, weight in model.named_parameters():
        torch.testing.assert_close(gradients[key], weight.grad, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize(("name", "teacher_name"), PAIRS)
@pytest.mark.parametrize("form", ["hidden", "logits", "top k"])
def test_an_evaluation_agrees_with_the_logits_of_both(name: str, teacher_name: str, form: str) -> None:
    model, other = small(name, 0), small(teacher_name, 8).requires_grad_(False)
    with torch.no_grad():
        for one in (model, other):  # so that some are agreed on
            one.lm_head.bias.copy_(2 * small(name, 0).lm_head.bias)
    head, other_head = (find_head(one, {"use_cache": False}) for one in (model, other))
    given = batch()
    given["positions"] = (given["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    told = ModelTeacher(other, {"use_cache": False}, head=other_head)
    told.whole_logits = form == "logits"
    config = DistillationConfig(alpha=0.6, temperature=3.0, divergence="jsd", missing_mass="zero")
    student = Student(model, {"use_cache": False}, head, Objective(config, told.logit_scale, told.softcap)).eval()
    outputs = told.outputs(given, "validation", 1.0)
    with torch.no_grad():
        z, y = own_logits(model, given), own_logits(other, given)
        if form == "top k":  # all of them, in an order of their own
            order = torch.randperm(50).expand_as(y)
            outputs = {"top_log_probs": y.log_softmax(-1).gather(1, order), "top_indices": order}
        judged = student(given, outputs)
    agreed = int((z.argmax(-1) == y.argmax(-1)).sum())
    assert 0 < agreed < len(z)
    assert int(judged["agreed"]) == agreed
    kl = (y.softmax(-1) * (y.log_softmax(-1) - z.log_softmax(-1))).sum()
    assert judged["kl_sum"].item() == pytest.approx(kl.item(), rel=1e-6)


class OneHead(torch.nn.Module):
    """What makes the given hidden states; its head gives logits of them."""

    def __init__(self, head: torch.nn.Linear, whole: bool = False):
        super().__init__()
        self.lm_head, self.whole = head, whole

    def forward(self, hidden: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=hidden, logits=self.lm_head(hidden) if self.whole else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", ["neither", "teacher", "both"])
def test_models_that_are_alike_agree_in_half_precision(dtype: torch.dtype, whole: str) -> None:
    """Among 20,000 logits in bf16 many are equal; the head is one that bf16 and float16 can hold."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 20_000, bias=False)
    linear.weight.data = linear.weight.data.bfloat16().float().clamp(min=2**-10)
    hidden = torch.randn(1, 300, 64).bfloat16().float().half().float()
    given = {"labels": torch.zeros(1, 300, dtype=torch.int64), "hidden": hidden}
    model = OneHead(linear, whole == "both")
    head = None if whole == "both" else LinearHead(model, linear)
    config = DistillationConfig(alpha=0.5)
    student = Student(model, {}, head, Objective(config)).eval()  # type: ignore[arg-type]
    states, weight = hidden[0].to(dtype), linear.weight.detach().to(dtype)
    told = {"hidden": states, "head": weight} if whole == "neither" else {"logits": states @ weight.T}
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            judged = student(given, told)
        assert int(judged["agreed"]) == 300
        assert judged["kl_sum"].item() / 300 < 1e-3
    with torch.no_grad():
        others = student(given, {**told, **({"head": weight.roll(1, 0)} if whole == "neither" else {})})
        assert whole != "neither" or int(others["agreed"]) < 30


def test_logits_of_a_fused_head_beside_whole_ones_are_not_rounded() -> None:
    """Where the teacher's are given whole, the student's are made in float32 under autocast too."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 500)
    hidden, told = torch.randn(40, 64).bfloat16(), torch.randn(40, 500)
    labels = torch.randint(0, 500, (40,))
    objective = Objective(DistillationConfig(alpha=0.5, temperature=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        kd = objective.loss(HeadInput(hidden, linear.weight, linear.bias), labels, {"logits": told})
    z = torch.nn.functional.linear(hidden.double(), linear.weight.double(), linear.bias.double())
    kl = (told.double().softmax(-1) * (told.double().log_softmax(-1) - z.log_softmax(-1))).sum()
    assert kd.divergence_sum.item() == pytest.approx(kl.item(), rel=1e-6)
    kd.loss_sum.backward()
    assert linear.weight.grad is not None


def test_kl_of_evaluations_does_not_depend_on_what_is_trained_with() -> None:
    """And is 0 for equal models, though the teacher is a top k."""
    torch.manual_seed(0)
    logits = torch.randn(20, 100) * 2
    other = torch.randn(20, 100) * 2
    top = logits.log_softmax(-1).topk(8)
    teacher = {"top_log_probs": top.values, "top_indices": top.indices}
    values = []
    for settings in (
        {"missing_mass": "tail", "temperature": 1.0},
        {"missing_mass": "renormalise", "temperature": 4.0},
        {"missing_mass": "zero", "alpha": 0.9},
    ):
        objective = Objective(DistillationConfig(**settings)).for_evaluation()
        labels = torch.zeros(20, dtype=torch.int64)
        own, apart = (objective.loss(z, labels, teacher).divergence_sum.item() for z in (logits, other))
        assert own == pytest.approx(0.0, abs=1e-4)
        values.append(apart)
    assert values[0] > 1
    assert values == [values[0]] * 3


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize(("precision", "in_evaluation"), [("bf16", None), ("fp32", "fp32"), (None, None)])
def test_the_loss_is_computed_as_the_config_says_and_never_evaluated_in_bf16(
    precision: str | None, in_evaluation: str | None, teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(student: Any, teacher: Any, labels: Any, formula: Formula, computing: Computing) -> KDLoss:
        seen.append((computing, formula.alpha))
        return linear_kd(student, teacher, labels, formula, computing)

    monkeypatch.setattr("forge.student.objective.linear_kd", spy)
    linear = torch.nn.Linear(64, 500)
    given = {"labels": torch.zeros(1, 7, dtype=torch.int64), "hidden": torch.randn(1, 7, 64)}
    told = {"hidden": torch.randn(7, 64), "head": torch.randn(500, 64)} if teacher else None
    computing = LossConfig(memory_budget_gib=0.5, low_memory=True, precision=precision)
    objective = Objective(DistillationConfig(alpha=0.3 if teacher else 0.0), computing=computing)
    student = Student(torch.nn.Identity(), {}, LinearHead(OneHead(linear), linear), objective)
    student.train()(given, told)
    student.eval()(given, told)
    alphas = (0.3, 0.5) if teacher else (0.0, 0.0)  # an evaluation's divergence has one weight for all
    assert seen == [
        (Computing(precision, memory_budget=2**29, low_memory=True), alphas[0]),
        (Computing(in_evaluation, memory_budget=2**29, low_memory=True), alphas[1]),
    ]


def test_what_a_top_k_lacks_is_treated_as_the_config_says() -> None:
    torch.manual_seed(2)
    logits, labels = torch.randn(5, 12), torch.randint(0, 12, (5,))
    top = torch.randn(5, 12).log_softmax(-1).topk(3)
    told = {"top_log_probs": top.values, "top_indices": top.indices}
    divergences = []
    for missing_mass in ("tail", "renormalise", "zero"):
        config = DistillationConfig(alpha=0.5, temperature=2.0, missing_mass=missing_mass)
        kd = Objective(config).loss(logits, labels, told)
        pairs = zip(logits, top.values, top.indices, strict=True)
        expected = sum(sparse_kl(row, log_q, at, 2.0, missing_mass) for row, log_q, at in pairs)
        assert kd.divergence_sum.item() == pytest.approx(float(expected), rel=1e-5)
        divergences.append(kd.divergence_sum.item())
    assert len({round(value, 3) for value in divergences}) == 3


def test_a_column_that_a_model_lacks_is_never_its_argmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert tied_for_argmax(logits, torch.tensor([2, 1, 3])).tolist() == [True, False, False]


def test_calibration_has_a_bin_for_certainty_and_bears_a_nan() -> None:
    """The bins are [0, 1/15), [1/15, 2/15), ...; a confidence of 1 is in the last of them."""
    outputs = {"confidences": torch.tensor([1.0, 0.5, torch.nan]), "predictions": torch.tensor([[4, 5, 6, 7]])}
    batch = {"labels": torch.tensor([[4, 0, 0, 7]]), "positions": torch.tensor([0, 1, 3])}
    bins = torch.zeros(CALIBRATION_BINS, 2, dtype=torch.float64)
    _calibrate(bins, outputs, batch)
    assert bins[[14, 7]].tolist() == [[1.0, 1.0], [0.0, 0.5]]
    assert bins[0, 0].item() == 1.0
    assert bins[:, 0].sum().item() == 2.0
