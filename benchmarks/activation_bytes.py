"""What backward needs of a forward: forge.plan's count against the tensors that torch saves, on this CPU.

    python benchmarks/activation_bytes.py X.yaml [--rows B] [--tokens T] [--set KEY=VALUE …]

Each model is that of a config, with random ids in rows of which one is padded, and shown in three forms: float32,
autocast to bf16, and bf16 weights. Shared storages count once; weights and autocast's copies of them are left out.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

from forge.config.loader import load_config
from forge.memory.activations import Form, activation_bytes
from forge.memory.meta import row_shape, student_on_meta
from forge.memory.sizes import RowShape, sizes_of

FORMS = {"float32": Form(4, 4, True), "autocast": Form(4, 2, True), "bfloat16": Form(2, 2, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="X.yaml")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    table = Table("model", "rows x tokens", "form", "saved MiB", "counted MiB", "error", box=None)
    for name in args.configs:
        config = load_config(Path(name), args.set).config
        for form_name, form in FORMS.items():
            model = student_on_meta(config).to_empty(device="cpu").train()
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
            shape = row_shape(config, model.config, args.tokens)
            model = model.bfloat16() if form.weights == 2 else model
            saved = saved_bytes(model, form, args.rows, shape)
            counted = activation_bytes(sizes_of(model, shape).stacks, form, args.rows)
            size = f"{args.rows} x {shape.tokens}"
            error = f"{100 * (counted / saved - 1):+.1f} %"
            table.add_row(name, size, form_name, f"{saved / 2**20:,.1f}", f"{counted / 2**20:,.1f}", error)
    Console(width=140).print(table)


def saved_bytes(model: Any, form: Form, rows: int, shape: RowShape) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        copy = form.autocast and tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if tensor.untyped_storage().data_ptr() not in own and not copy:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other gets its place
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if form.autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = list(forward(model, rows, shape))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def forward(model: Any, rows: int, shape: RowShape) -> Iterator[Any]:
    """The model below its head: the loss is counted apart."""
    ids = torch.randint(5, 90, (rows, shape.tokens))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    if hasattr(model, "enc_to_dec_proj") or hasattr(model, "encoder"):
        encoder = model.encoder.config
        pixels = torch.rand(rows, encoder.num_channels, *encoder.image_size, dtype=model.dtype)
        memory = model.encoder(pixel_values=pixels).last_hidden_state
        memory = model.enc_to_dec_proj(memory) if hasattr(model, "enc_to_dec_proj") else memory
        options = {"encoder_hidden_states": memory, "use_cache": False}
        yield model.decoder.model.decoder(input_ids=ids, attention_mask=mask, **options)
        return
    options = {"use_cache": False} if model.can_generate() else {}
    yield model.base_model(input_ids=ids, attention_mask=mask, **options)


if __name__ == "__main__":
    main()
