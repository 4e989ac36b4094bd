"""Compares the activations that `forge plan` counts for backward with the tensors that torch saves on this CPU.

    python benchmarks/activation_bytes.py X.yaml [--rows B] [--tokens T] [--set KEY=VALUE …]

The model of each config gets rows of random ids, one of them padded, and is measured in three forms: float32, autocast
to bf16, and bf16 weights. A shared storage counts once; weights and autocast's copies of them are left out.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from forge.config.loader import load_config
from forge.config.schema import Config
from forge.data.batches import model_inputs
from forge.memory.activations import step_bytes
from forge.memory.meta import student_on_meta
from forge.memory.totals import Form, Pass
from forge.task.load import task_class

FORMS = {"float32": Form(4, 4, True), "autocast": Form(4, 2, True), "bfloat16": Form(2, 2, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="X.yaml")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    table = Table("model", "rows x tokens", "form", "saved MiB", "counted MiB", "error", "seconds", box=None)
    for name in args.configs:
        config = load_config(Path(name), args.set).config
        for form_name, form in FORMS.items():
            model = student_on_meta(config)
            batch = padded_batch(config, model, args.rows, args.tokens)
            start = time.perf_counter()
            counted = step_bytes(student_on_meta(config), lambda _, batch=batch: batch, Pass(form), args.rows).kept
            seconds = time.perf_counter() - start
            saved = saved_bytes(model, form, batch)
            error = f"{100 * (counted / saved - 1):+.2f} %"
            size = f"{args.rows} x {next(x for x in batch.values() if x.dtype == torch.int64).shape[1]}"
            mib = (f"{saved / 2**20:,.1f}", f"{counted / 2**20:,.1f}")
            table.add_row(name, size, form_name, *mib, error, f"{seconds:.1f}")
    Console(width=140).print(table)


def padded_batch(config: Config, model: Any, rows: int, tokens: int | None) -> dict[str, Any]:
    """Return a batch of the task's inputs, with padding in the first row and noise as images."""
    task = task_class(config)
    batch = model_inputs(task.planned_batch(config, config.model, model.config, rows, tokens))
    for name, tensor in batch.items():
        if name == "attention_mask":
            tensor[0, -2:] = 0
        elif tensor.is_floating_point():
            tensor.uniform_()
    return batch


def saved_bytes(model: Any, form: Form, batch: dict[str, Tensor]) -> int:
    """Return the bytes of all storages that a forward without the head takes, saves for backward and returns."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if head is not None and part is head:
                setattr(module, name, nn.Identity())
    model = model.to_empty(device="cpu").train()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    model = model.bfloat16() if form.weights == 2 else model
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    shapes = {shape for p in model.parameters() if p.dim() > 1 for shape in (p.shape, p.mT.shape)}
    held: dict[int, Tensor] = {}  # holds the tensors too, so that no other storage gets the same address

    def hold(tensor: Tensor) -> Tensor:
        copy = form.autocast and tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if tensor.untyped_storage().data_ptr() not in own and not copy:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    given = {name: hold(x.to(model.dtype) if x.is_floating_point() else x) for name, x in batch.items()}
    options = {"use_cache": False} if model.can_generate() else {}
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if form.autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor), autocast:
        hold(model(**given, **options).logits)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


if __name__ == "__main__":
    main()
