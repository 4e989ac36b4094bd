"""The loss of a student is the model's own, with its head fused or not; its predictions are the likeliest labels."""

from types import SimpleNamespace

import pytest
import torch
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

from forge.losses.cross_entropy import IGNORE
from forge.model.adapter import put_on
from forge.model.head import LinearHead, find_head
from forge.trainer.student import Student

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
        likeliest, other_likeliest = plain(given)["predictions"], fused(given)["predictions"]
    assert other_likeliest.shape == (3, 9)
    assert likeliest.flatten()[counted].tolist() == other_likeliest.flatten()[counted].tolist()


def test_a_head_that_is_more_than_a_matrix_is_not_fused() -> None:
    model = build(CONFIGS["llama"])
    put_on(model, LoraConfig(target_modules=["q_proj"]))
    assert isinstance(find_head(model, {}), LinearHead)
    model = build(CONFIGS["llama"])
    put_on(model, LoraConfig(target_modules=["lm_head"]))
    assert find_head(model, {}) == "its head is peft.tuners.lora.layer.Linear"
    odd = build(CONFIGS["gemma 2 with a softcap"])
    original = odd.forward
    odd.forward = lambda **inputs: _doubled(original(**inputs))
    assert find_head(odd, {}) == "Gemma2ForCausalLM does more to its logits than forge knows of"


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


def test_the_likeliest_token_does_not_depend_on_mixed_precision() -> None:
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
