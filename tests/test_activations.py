"""What a step holds without memory, against the tensors that torch really saves and against counts by hand."""

import resource
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    VisionEncoderDecoderConfig,
)

from forge.memory.activations import AsOnCuda, forward_bytes, row_bytes, step_bytes
from forge.memory.totals import GIB, Form, Pass, RowBytes

B, T, WIDTH, HEADS, INNER = 4, 32, 48, 6, 104
FORMS = {"float32": Form(4, 4, True), "autocast": Form(4, 2, True), "bfloat16": Form(2, 2, True)}
# What is held besides: a scalar here and there that autograd makes anew and the model keeps, or the other way around.
TOLERANCE = 0.003


def lm(kind: str, layers: int, **more: Any) -> Any:
    config = AutoConfig.for_model(
        kind,
        **{
            **{"vocab_size": 97, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers},
            **{"num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
            **more,
        },
    )
    return AutoModelForCausalLM.from_config(config)


def gpt2(layers: int) -> Any:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=97, n_embd=WIDTH, n_inner=INNER, n_layer=layers, n_head=HEADS, n_positions=64,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def bert(layers: int, attention_dropout: float = 0.0, dropout: float = 0.1) -> Any:
    config = AutoConfig.for_model(
        "bert",
        **{"vocab_size": 97, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers},
        **{"num_attention_heads": HEADS, "max_position_embeddings": 64, "hidden_dropout_prob": dropout},
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
    "bert, attention dropout": lambda layers: bert(layers, attention_dropout=0.1),
    "reader": reader,
}


def batch_of(model: Any) -> Callable[[int], dict[str, Any]]:
    def batch(rows: int) -> dict[str, Any]:
        ids = torch.arange(rows * T).view(rows, T) % 90 + 3
        if hasattr(model, "enc_to_dec_proj"):
            return {"pixel_values": torch.ones(rows, 1, 32, 64), "decoder_input_ids": ids, "use_cache": False}
        mask = torch.ones(rows, T, dtype=torch.int64)
        mask[0, -3:] = 0  # a padded row: without one transformers passes no mask on
        options = {} if model.base_model_prefix == "bert" else {"use_cache": False}
        return {"input_ids": ids, "attention_mask": mask, **options}

    return batch


def saved_bytes(model: Any, form: Form) -> int:
    """The bytes of all storages that a real forward below the head saves for backward, takes and gives.

    Weights are left out, and autocast's copies of them.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    shapes = {shape for p in model.parameters() if p.dim() > 1 for shape in (p.shape, p.mT.shape)}
    held: dict[int, torch.Tensor] = {}  # the tensors too, so that no other storage gets their place

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        copy = form.autocast and tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if tensor.untyped_storage().data_ptr() not in own and not copy:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if head is not None and part is head:
                setattr(module, name, torch.nn.Identity())
    batch = batch_of(model)(B)
    for name, tensor in batch.items():
        if isinstance(tensor, torch.Tensor):
            batch[name] = hold(tensor.to(model.dtype) if tensor.is_floating_point() else tensor)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if form.autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor), autocast:
        hold(model(**batch).logits)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def on_meta(name: str, layers: int) -> Any:
    with torch.device("meta"):
        return MODELS[name](layers)


def real(name: str, layers: int, form: Form) -> Any:
    torch.manual_seed(0)
    model = MODELS[name](layers).train()
    return model.bfloat16() if form.weights == 2 else model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_what_torch_saves(name: str, form: str) -> None:
    model = on_meta(name, 2)
    counted = step_bytes(model, batch_of(model), Pass(FORMS[form]), B)
    assert counted.kept == pytest.approx(saved_bytes(real(name, 2, FORMS[form]), FORMS[form]), rel=TOLERANCE)
    assert counted.kept < counted.peak < 1.3 * counted.kept


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_layer_keeps_no_input(form: str) -> None:
    def adapted(model: Any) -> Any:
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)).get_base_model()

    model = adapted(on_meta("llama", 2))
    counted = step_bytes(model, batch_of(model), Pass(FORMS[form]), B).kept
    twin = adapted(real("llama", 2, FORMS[form]))
    twin = twin.bfloat16() if FORMS[form].weights == 2 else twin
    assert counted == pytest.approx(saved_bytes(twin, FORMS[form]), rel=TOLERANCE)
    plain = get_peft_model(on_meta("llama", 2), LoraConfig(r=4, target_modules=["q_proj"])).get_base_model()
    whole = on_meta("llama", 2)
    assert step_bytes(plain, batch_of(plain), Pass(FORMS[form]), B).kept < 0.8 * (
        step_bytes(whole, batch_of(whole), Pass(FORMS[form]), B).kept
    )


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_checkpointing_keeps_inputs_and_one_layer(name: str) -> None:
    form = FORMS["float32"]
    model, less = on_meta(name, 4), on_meta(name, 3)
    plain = step_bytes(model, batch_of(model), Pass(form), B)
    layer = plain.kept - step_bytes(less, batch_of(less), Pass(form), B).kept
    counted = step_bytes(model, batch_of(model), Pass(form, checkpointing=True), B)
    twin = real(name, 4, form)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    held = saved_bytes(twin, form)
    assert held > 4 * B * T * WIDTH * 4  # each layer's input
    assert held <= counted.kept < 1.05 * held  # a mask and positions besides, which no hook sees
    assert counted.kept + layer < counted.peak < counted.kept + 1.6 * layer
    assert counted.peak < plain.peak
    again = step_bytes(model, batch_of(model), Pass(form), B)
    assert again == plain  # the model is as it was


def test_rows_beyond_those_that_were_run_are_a_straight_line() -> None:
    model = on_meta("bert, attention dropout", 2)
    passes = [Pass(form, checkpointing) for form in (Form(4, 2), Form(2, 2)) for checkpointing in (False, True)]
    lines = row_bytes(model, batch_of(model), passes)
    assert list(lines) == passes
    for each, line in lines.items():
        assert line.of(9) == pytest.approx(step_bytes(model, batch_of(model), each, 9).peak, rel=0.01)
        assert 0 <= line.fixed < 0.02 * line.per_row
    model = on_meta("llama", 2)
    line = row_bytes(model, batch_of(model), passes[:1])[passes[0]]
    assert line.fixed > T * 8 * 4  # of the rotary tables, (T, head_dim) float32
    assert RowBytes(3, 5).of(4) == 23


def test_a_weights_gradient_is_not_counted() -> None:
    with torch.device("meta"):
        model = lm("llama", 2, vocab_size=100_000)
    table = 100_000 * WIDTH * 4  # 30 times the rest
    assert step_bytes(model, batch_of(model), Pass(FORMS["float32"]), B).peak < table / 10


def test_the_head_is_back_in_its_place() -> None:
    model = on_meta("llama", 1)
    head = model.get_output_embeddings()
    step_bytes(model, batch_of(model), Pass(FORMS["float32"]), B)
    assert model.get_output_embeddings() is head


def test_a_teacher_keeps_nothing() -> None:
    teacher = on_meta("llama", 3).requires_grad_(False)
    deeper = on_meta("llama", 6).requires_grad_(False)
    forward = forward_bytes(teacher, batch_of(teacher), Form(2, 2))
    assert forward == forward_bytes(deeper, batch_of(deeper), Form(2, 2))
    assert forward.fixed > T * 8 * 2  # of the rotary tables, (T, head_dim) bf16
    # In the MLP, for each token: three of the residual stream, three of the inner width, and a mask; in bf16.
    assert forward.of(B) == pytest.approx(B * T * (3 * WIDTH + 3 * INNER + T) * 2, rel=0.15)


def test_more_is_counted_than_there_is_memory() -> None:
    with torch.device("meta"):
        model = lm("llama", 2, hidden_size=4096, intermediate_size=16384, num_attention_heads=32, head_dim=128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counted = step_bytes(
        model, lambda rows: {"input_ids": torch.ones(rows, 32_768, dtype=torch.int64)}, Pass(Form(2, 2)), 4
    )
    assert counted.kept > 30 * GIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_experts_are_counted_though_it_depends_on_values_which_are_taken() -> None:
    with torch.device("meta"):
        model = lm("qwen3_moe", 2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=INNER)
    dense, form = on_meta("qwen3", 2), Pass(FORMS["float32"])
    assert step_bytes(model, batch_of(model), form, B).kept > step_bytes(dense, batch_of(dense), form, B).kept


class Saved:
    """The bytes that are saved for backward within, by storage."""

    def __enter__(self) -> dict[int, int]:
        self.found: dict[int, int] = {}
        self.held: list[Any] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self.found

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.held.append(tensor)
        self.found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor


def test_dropout_keeps_bools_on_cuda() -> None:
    with FakeTensorMode():
        x = torch.empty(10, 30, requires_grad=True)
        for train, expected in ((True, 300), (False, 0)):
            with Saved() as saved, AsOnCuda(autocast=False):
                assert torch.nn.Dropout(0.1).train(train)(x).shape == x.shape
            assert sum(saved.values()) == expected
        with Saved() as saved:
            F.dropout(x, 0.1)
        assert sum(saved.values()) == 4 * 300  # of a CPU: in the dtype of the input


@pytest.mark.parametrize(
    ("dtype", "masked", "p", "bias"),
    [
        (torch.bfloat16, False, 0.0, 0),
        (torch.bfloat16, False, 0.1, 0),
        (torch.bfloat16, True, 0.1, 2 * 1 * 40 * 48 * 2),  # rows of 40 keys in memory of 48
        (torch.float32, True, 0.0, 2 * 1 * 40 * 48 * 4),
        (torch.float32, False, 0.0, 0),
    ],
)
def test_attention_keeps_no_matrix_for_each_head_on_cuda(dtype: torch.dtype, masked: bool, p: float, bias: int) -> None:
    rows, heads, tokens, width = 2, 6, 40, 16
    with FakeTensorMode():
        q, k, v = (torch.empty(rows, heads, tokens, width, dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool) if masked else None
        with Saved() as saved, AsOnCuda(autocast=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    assert out.shape == q.shape
    tensors = 4 * rows * heads * tokens * width * dtype.itemsize  # queries, keys, values and output
    sums = rows * heads * (64 if dtype == torch.float32 or masked else tokens) * 4  # of each query; padded to 32 rows
    assert sum(saved.values()) == pytest.approx(tensors + bias + sums, abs=64)  # and a seed


def test_keys_and_values_that_heads_share() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 6, 40, 16, requires_grad=True)
        k, v = (torch.empty(2, 2, 40, 16, requires_grad=True) for _ in range(2))
        for dtype in (torch.float32, torch.bfloat16):
            given = (x.to(dtype) for x in (q, k, v))
            with AsOnCuda(autocast=False):
                out = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
            assert (out.shape, out.dtype) == (q.shape, dtype)


def test_autocast_on_cuda_normalises_in_float32_and_attends_in_bf16() -> None:
    with FakeTensorMode() as mode, torch.autocast("cpu", torch.bfloat16), AsOnCuda(autocast=True):
        half, whole = torch.empty(2, 6, 8, dtype=torch.bfloat16), torch.empty(1, 2, 6, 8)
        assert F.layer_norm(half, (8,)).dtype == torch.float32
        assert half.softmax(-1).dtype == torch.float32
        assert F.softmax(half, dim=-1).dtype == torch.float32
        assert F.scaled_dot_product_attention(whole, whole, whole).dtype == torch.bfloat16
    with mode, torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(half, (8,)).dtype == torch.bfloat16  # of a CPU
