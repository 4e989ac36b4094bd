"""What backward needs of a forward, as forge.plan counts it, against the tensors that torch really saves."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    VisionEncoderDecoderConfig,
)

from forge.memory.activations import Block, Form, Stack, activation_bytes, layer_bytes, working_bytes
from forge.memory.sizes import RowShape, sizes_of

B, T, WIDTH, HEADS, INNER, PATCHES = 4, 32, 48, 6, 104, 9
FORMS = {"float32": Form(4, 4, True), "autocast": Form(4, 2, True), "bfloat16": Form(2, 2, True)}
# Of three layers. With adapters the first keeps less, since nothing before it is trained.
TOLERANCE, OF_ADAPTERS = 0.04, 0.07


def lm(kind: str, layers: int, **more: Any) -> Any:
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": 97, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers},
        **{"num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
        **more,
    )
    return AutoModelForCausalLM.from_config(config)


def gpt2(layers: int) -> Any:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=97, n_embd=WIDTH, n_inner=INNER, n_layer=layers, n_head=HEADS, n_positions=64,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def bert(layers: int, attention_dropout: float = 0.0) -> Any:
    config = AutoConfig.for_model(
        "bert",
        **{"vocab_size": 97, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers},
        **{"num_attention_heads": HEADS, "max_position_embeddings": 64},
        attention_probs_dropout_prob=attention_dropout,
    )
    return AutoModelForSequenceClassification.from_config(config)


def reader(layers: int) -> Any:
    encoder = AutoConfig.for_model(
        "vit", hidden_size=40, intermediate_size=88, num_hidden_layers=2, num_attention_heads=5, image_size=[32, 64],
        patch_size=[32, 8], num_channels=1,
    )  # fmt: skip
    decoder = AutoConfig.for_model(
        "trocr", d_model=WIDTH, decoder_layers=layers, decoder_attention_heads=HEADS, decoder_ffn_dim=INNER,
        vocab_size=97, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    )


MODELS: dict[str, Callable[[int], Any]] = {
    "llama": lambda layers: lm("llama", layers),
    "qwen3": lambda layers: lm("qwen3", layers),
    "gpt2": gpt2,
    "bert": bert,
    "reader": reader,
}


def saved_bytes(model: Any, form: Form) -> int:
    """Of unique storages, weights and their copies left out, that the body's forward saves for backward."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        copy = form.autocast and tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if place not in own and not copy:
            kept[place] = tensor  # held, so that no other storage gets its place
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if form.autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = run(model)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def run(model: Any) -> Any:
    ids = torch.arange(B * T).view(B, T) % 90 + 3
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, -3:] = 0  # a padded row: else transformers passes no mask on
    if hasattr(model, "enc_to_dec_proj"):
        pixels = torch.ones(B, 1, 32, 64, dtype=model.dtype)
        memory = model.enc_to_dec_proj(model.encoder(pixel_values=pixels).last_hidden_state)
        decoder = model.decoder.model.decoder
        return decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=memory, use_cache=False)
    options = {} if model.base_model_prefix == "bert" else {"use_cache": False}
    return model.base_model(input_ids=ids, attention_mask=mask, **options)


def built(name: str, layers: int, form: Form) -> Any:
    torch.manual_seed(0)
    model = MODELS[name](layers).train()
    return model.bfloat16() if form.weights == 2 else model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_the_count_is_what_torch_saves(name: str, form: str) -> None:
    model = built(name, 3, FORMS[form])
    sizes = sizes_of(model, RowShape(T, PATCHES))
    counted = activation_bytes(sizes.stacks, FORMS[form], B)
    assert counted == pytest.approx(saved_bytes(model, FORMS[form]), rel=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_layer_is_counted_to_a_hundredth(name: str, form: str) -> None:
    less, more = (built(name, layers, FORMS[form]) for layers in (1, 2))
    block = sizes_of(more, RowShape(T)).stacks[0].block
    saved = saved_bytes(more, FORMS[form]) - saved_bytes(less, FORMS[form])
    assert B * layer_bytes(block, T, FORMS[form]) == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"]])
def test_a_frozen_layer_keeps_no_input(target: Any, form: str) -> None:
    model = get_peft_model(built("llama", 3, FORMS[form]), LoraConfig(r=4, target_modules=target)).get_base_model()
    if FORMS[form].weights == 2:
        model = model.bfloat16()  # type: ignore[operator]
    sizes = sizes_of(model, RowShape(T))  # type: ignore[arg-type]
    counted = activation_bytes(sizes.stacks, FORMS[form], B)
    assert counted == pytest.approx(saved_bytes(model, FORMS[form]), rel=OF_ADAPTERS)
    assert counted < activation_bytes(sizes_of(built("llama", 3, FORMS[form]), RowShape(T)).stacks, FORMS[form], B)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_of_attention_keeps_matrices_on_a_cpu_only(form: str) -> None:
    model = bert(3, attention_dropout=0.1).train()
    model = model.bfloat16() if FORMS[form].weights == 2 else model
    stacks = sizes_of(model, RowShape(T)).stacks
    saved = saved_bytes(model, FORMS[form])
    assert activation_bytes(stacks, FORMS[form], B) == pytest.approx(saved, rel=TOLERANCE)
    assert activation_bytes(stacks, replace(FORMS[form], on_cpu=False), B) < saved
    longer = [replace(stack, tokens=2 * T) for stack in stacks]
    of_mask = 3 * B * (2 * T * 2 * T - 2 * T * T) * 4  # the mask of padded rows alone grows with the square
    grown = activation_bytes(longer, Form(4, 4), B) - 2 * activation_bytes(stacks, Form(4, 4), B)
    assert grown == of_mask


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_checkpointing_keeps_inputs_and_one_layer(name: str) -> None:
    form, layers = FORMS["float32"], 4
    model, less = built(name, layers, form), built(name, layers - 1, form)
    one = saved_bytes(model, form) - saved_bytes(less, form)
    stacks = sizes_of(model, RowShape(T)).stacks
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    held = saved_bytes(model, form)
    assert held > layers * B * T * WIDTH * 4  # each layer's input
    counted = activation_bytes(stacks, form, B, checkpointing=True)
    assert counted == pytest.approx(held + one, rel=0.06)
    assert counted < activation_bytes(stacks, form, B)


def test_hand_counted_layer() -> None:
    block = Block(width=8, heads=2, kv_heads=1, head_dim=4, inner=16, gated=True, mlp_readers=2, rms=True)
    norms = 2 * (4 * 8 + 4 * 8 + 4)  # input, normalized, one over the root
    attention = 8 * 4 + 4 * 8 * 4 + 2 * 4 + 3 * 4  # input; queries, repeated keys and values, output; sums; mask
    mlp = 8 * 4 + 4 * 16 * 4  # input; gate before and behind the activation, up, their product
    assert layer_bytes(block, 3, Form(4, 4)) == 3 * (norms + attention + mlp)
    unpadded = replace(block, masked=False)  # keys and values as they are: 4 wide, and no mask
    assert layer_bytes(unpadded, 3, Form(4, 4)) == 3 * (norms + attention - 3 * 4 - 2 * 4 * 4 + mlp)
    casts = (3 - 1) * 2 * 8 + (2 - 1) * 2 * 8  # each of five linear layers has its own copy of its input
    half = norms + 8 * 2 + 4 * 8 * 2 + 2 * 4 + 3 * 2 + 8 * 2 + 4 * 16 * 2
    assert layer_bytes(block, 3, Form(4, 2)) == 3 * (half + casts)


def test_activations_are_linear_in_rows() -> None:
    stack = Stack("layers", 5, Block(width=8, heads=2, kv_heads=2, head_dim=4, inner=32), 7, norms=1)
    for checkpointing in (False, True):
        one = activation_bytes([stack], Form(4, 2), 1, checkpointing=checkpointing)
        assert activation_bytes([stack], Form(4, 2), 6, checkpointing=checkpointing) == 6 * one
    assert working_bytes([stack], Form(4, 4), 3) == 3 * 7 * (4 * 2 * 32 + 4 * 2 * 8)
