"""The bytes that a training step holds besides weights, from a run of the model on tensors without memory.

Under torch's FakeTensorMode a tensor has a shape, a dtype and a storage of a known size, but no memory, and nothing is
computed. So the true model takes a true step, autograd saves what it would save, and the storages that are alive are
counted, whatever the architecture, its adapters, its frozen weights, its dropout, and gradient checkpointing.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from forge.memory.totals import Form, Pass, RowBytes

Inputs = Callable[[int], dict[str, Any]]  # what the model is called with, for a number of rows; tensors on the CPU
BIAS_COLUMNS = 16  # the efficient attention kernel takes an additive mask whose rows are a multiple of this
FEW, MORE = 2, 3  # rows of the two steps from which any other number of rows is extrapolated; 1 would broadcast


@dataclass(frozen=True)
class StepBytes:
    """What a step holds besides weights, their gradients and autocast's copies of them."""

    kept: int  # after forward: what backward needs, and the model's output
    peak: int  # at most, in forward or in backward


def row_bytes(model: PreTrainedModel, inputs: Inputs, passes: Iterable[Pass]) -> dict[Pass, RowBytes]:
    """Return the peak of a training step for each pass, as a function of the rows of a micro-batch.

    What does not grow with the rows (rotary tables, positions) is the same in every pass, so only the forward of the
    first is run twice.

    model: on the meta device; it is changed.
    """
    found: dict[Pass, RowBytes] = {}
    fixed: int | None = None
    for each in passes:
        few = step_bytes(model, inputs, each, FEW)
        if fixed is None:
            more = step_bytes(model, inputs, each, MORE, backward=False)
            fixed = max(0, few.kept - FEW * (more.kept - few.kept) // (MORE - FEW))
        found[each] = RowBytes(fixed, -(-(few.peak - fixed) // FEW))
    return found


def step_bytes(model: PreTrainedModel, inputs: Inputs, each: Pass, rows: int, *, backward: bool = True) -> StepBytes:
    """Return what a forward below the head and its backward hold.

    model: on the meta device; it is changed. backward: False leaves backward out of the peak, in half the time.
    """
    form = each.form
    batch = inputs(rows)
    with _no_memory(model, form) as fake, _without_head(model), _checkpointing(model, each):
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        storages = _Storages(model)
        for weight in weights:
            weight.register_post_accumulate_grad_hook(storages.leave_out_gradient)
        model.train()
        with storages:
            given = storages.given(batch, form, fake)
            with _device(form), torch.autocast("cpu", torch.bfloat16, enabled=form.autocast):
                output = _forward(model, given)
            kept = storages.alive()
            if backward and output.requires_grad:
                output.backward(torch.ones_like(output))
        return StepBytes(kept, storages.peak())


def forward_bytes(model: PreTrainedModel, inputs: Inputs, form: Form) -> RowBytes:
    """Return what a forward below the head holds at most where nothing is trained.

    model: on the meta device; it is changed.
    """
    peaks = []
    for batch in (inputs(FEW), inputs(MORE)):
        with _no_memory(model, form) as fake, _without_head(model):
            model.eval()
            with _Storages(model) as storages, torch.no_grad():
                given = storages.given(batch, form, fake)
                with _device(form):
                    _forward(model, given)
            peaks.append(storages.peak())
    few, more = peaks
    fixed = max(0, few - FEW * (more - few) // (MORE - FEW))
    return RowBytes(fixed, -(-(few - fixed) // FEW))


class AsOnCuda(TorchFunctionMode):
    """Makes a CPU tensor do what a CUDA tensor would: all that FakeTensorMode cannot tell in a build without CUDA.

    dropout: CUDA's fused kernel keeps a mask of bools; the CPU multiplies with a mask of floats, and keeps that.
    attention: scaled_dot_product_attention takes the flash kernel in half precision where there is no mask, and else
        the memory-efficient one, with or without dropout. The CPU has no dropout in its flash kernel and keeps three
        float32 matrices (heads, T, T) instead. A bool mask becomes an additive one for each layer on both.
    autocast: on CUDA normalisations and softmax compute in float32 and return it; on a CPU they keep their dtype.
        The operators that are cast to half precision are the same.
    """

    def __init__(self, autocast: bool):
        super().__init__()
        self.autocast = autocast

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout or function is torch.dropout:
            return _dropout(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            return _attention(self.autocast, *args, **kwargs)
        if self.autocast and function in _FLOAT32_UNDER_CUDA_AUTOCAST:
            args = tuple(arg.float() if _is_half(arg) else arg for arg in args)
            kwargs = {name: value.float() if _is_half(value) else value for name, value in kwargs.items()}
        return function(*args, **kwargs)


_FLOAT32_UNDER_CUDA_AUTOCAST = {
    *(F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax),
    *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.cumsum, Tensor.cumsum),
}


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **renamed: Any) -> Tensor:
    training = bool(renamed.get("train", training))
    return torch.native_dropout(input, p, True)[0] if training and 0.0 < p < 1.0 else input


def _attention(
    autocast: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """query: (B, heads, T, head_dim); key, value: (B, heads, S, head_dim), or fewer heads with enable_gqa."""
    if autocast:
        query, key, value = (x.bfloat16() for x in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def _bias(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """Return the mask as numbers to be added, (B, heads, T, keys), padded in memory as the kernel wants it."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    mask = mask.to(query.dtype)
    if keys % BIAS_COLUMNS:
        mask = F.pad(mask, (0, -keys % BIAS_COLUMNS))[..., :keys]
    return mask.expand(*query.shape[:3], keys)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


class _Storages(TorchDispatchMode):
    """Counts the bytes of each storage from the operator that makes it until nothing holds it any more.

    Weights do not count, nor do autocast's copies of them, nor the gradients that the weights are left with.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._weights = {id(storage): storage for storage in own}  # held: no other storage may get one of these ids
        self._alive: dict[
            int, tuple[int, Any]
        ] = {}  # id of a storage: its number and a reference that says when it dies
        self._bytes: list[int] = []  # by number
        self._events: list[tuple[int, int]] = []  # a storage's number, and 1 where it is made or -1 where it dies
        self._gradients: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            result = _called(function, args, kwargs or {})
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            result = _all_selected(function, args, error)
        casts_weight = function is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self._weights
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if casts_weight:
                    self._weights[id(storage)] = storage
                else:
                    self._add(storage)
        return result

    def given(self, batch: dict[str, Any], form: Form, fake: FakeTensorMode) -> dict[str, Any]:
        """Return a batch without memory, in the dtypes of the form, and count it."""
        dtype = torch.float32 if form.weights == 4 else torch.bfloat16
        batch = {name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
        for name, tensor in batch.items():
            if isinstance(tensor, Tensor):
                batch[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
                self._add(batch[name].untyped_storage())
        return batch

    def alive(self) -> int:
        """Return the bytes that are alive."""
        return sum(self._bytes[number] for number, _ in self._alive.values() if number not in self._gradients)

    def peak(self) -> int:
        """Return the most bytes that were alive at a time."""
        changes = (sign * self._bytes[number] for number, sign in self._events if number not in self._gradients)
        return max(accumulate(changes), default=0)

    def leave_out_gradient(self, weight: Tensor) -> None:
        """Take the gradient from a weight, as a hook after it was accumulated: it does not count."""
        if weight.grad is not None and (entry := self._alive.get(id(weight.grad.untyped_storage()))):
            self._gradients.add(entry[0])
        weight.grad = None

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._weights or key in self._alive:
            return
        number = len(self._bytes)

        def dies(_: Any) -> None:
            self._events.append((number, -1))
            del self._alive[key]

        self._bytes.append(storage.nbytes())
        self._events.append((number, 1))
        self._alive[key] = number, weakref.ref(storage, dies)


def _called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator; grouped_mm, which knows no dtype but bf16 where no memory is, gives the dtype of its input."""
    if function is not torch.ops.aten._grouped_mm.default:
        return function(*args, **kwargs)
    half = (arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
    return function(*half, **kwargs).to(args[0].dtype)


def _all_selected(function: Any, args: tuple[Any, ...], error: Exception) -> Any:
    """Return what an operator gives whose result depends on values, as if every element were selected and true.

    That is the most there can be. Raises the error for any other operator.
    """
    operators, first = torch.ops.aten, args[0]
    if function is operators._local_scalar_dense.default:
        return True if first.dtype == torch.bool else 1.0 if first.is_floating_point() else 1
    if function is operators.nonzero.default:
        return first.new_zeros((first.numel(), first.dim()), dtype=torch.int64)
    if function is operators.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
        return first.reshape(args[1][0].numel(), *first.shape[args[1][0].dim() :]).clone()
    raise error


def _forward(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return what the head reads, or a classifier's logits; the rest of the output is let go."""
    output: Tensor = model(**batch).logits
    return output


@contextmanager
def _no_memory(model: nn.Module, form: Form) -> Iterator[FakeTensorMode]:
    """Within, every tensor is without memory, and the model's weights have the dtype of the form."""
    made: dict[int, Tensor] = {}  # a weight that two modules share stays one

    def fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        return made[id(tensor)]

    with FakeTensorMode() as mode:
        weights = torch.float32 if form.weights == 4 else torch.bfloat16
        originals: list[Tensor] = []  # held, so that no id is given twice
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    originals.append(parameter)
                    shared = fake(parameter, weights if parameter.is_floating_point() else parameter.dtype)
                    if not isinstance(shared, nn.Parameter):
                        shared = made[id(parameter)] = nn.Parameter(shared, requires_grad=parameter.requires_grad)
                    module._parameters[name] = shared
            plain = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
            for holder, tensors in ((module._buffers, module._buffers), (vars(module), plain)):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        originals.append(tensor)
                        holder[name] = fake(tensor, tensor.dtype)
        yield mode


@contextmanager
def _without_head(model: PreTrainedModel) -> Iterator[None]:
    """Within, a language model's logits are what its head reads: the loss and its logits are counted apart."""
    head = model.get_output_embeddings()
    places = [] if head is None else [
        (module, name) for module in model.modules() for name, part in module.named_children() if part is head
    ]  # fmt: skip
    for module, name in places:
        setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, head)


@contextmanager
def _checkpointing(model: PreTrainedModel, each: Pass) -> Iterator[None]:
    if not each.checkpointing:
        yield
        return
    options = {
        "use_reentrant": False,
        "preserve_rng_state": False,  # a random state has no value without memory
        "context_fn": lambda: (nullcontext(), _device(each.form)),  # backward, which recomputes, leaves all such modes
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # these names are to go, but older versions have no others
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()


def _device(form: Form) -> AbstractContextManager[Any]:
    return nullcontext() if form.on_cpu else AsOnCuda(form.autocast)
