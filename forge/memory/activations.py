"""How many bytes a forward keeps for backward, from the shape of a model's layers: arithmetic alone, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """What training computes in. Without DeepSpeed the weights are float32, and autocast rounds what products read;
    with it weights and products have one dtype."""

    weights: int  # bytes of a trained weight, and of the residual stream
    products: int  # bytes of what a product reads and gives
    on_cpu: bool = False  # where dropout keeps floats and not bools, and drops attention with a matrix of (T, T)

    @property
    def autocast(self) -> bool:
        return self.weights != self.products


@dataclass(frozen=True)
class Block:
    """One layer. A reader is a linear layer that keeps its input, because its weight, or an adapter on it, is
    trained."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # the width within the MLP
    gated: bool = False
    activation: int = 1  # tensors of `inner` that the activation keeps of its input; 0: it keeps its output
    attention_readers: int = 3  # of the layer's input: queries, keys and values, or one for all of them
    mlp_readers: int = 1
    down_reads: bool = True  # the layer that leaves the MLP is a reader
    norms: int = 2
    rms: bool = False
    norms_trained: bool = True
    qk_norm: bool = False
    dropouts: int = 0  # over the width, with a rate above 0
    attention_dropout: bool = False
    masked: bool = True  # rows are padded, so that each layer has its own additive mask (T, T)
    eager: bool = False  # attention that keeps its probabilities
    source: int = 0  # tokens a row of an encoder that a second attention reads; 0: there is none
    cross_reads: bool = True  # that attention's query layer is a reader
    ranks: int = 0  # of all adapters of the layer together
    dropped: int = 0  # elements a token that adapters with dropout read


@dataclass(frozen=True)
class Stack:
    """Layers of one kind behind each other, and what lies before and behind them."""

    name: str
    layers: int
    block: Block
    tokens: int  # of a row
    norms: int = 0  # outside the layers, of the same width
    dropouts: int = 0


def activation_bytes(stacks: Sequence[Stack], form: Form, rows: int, *, checkpointing: bool = False) -> int:
    """The bytes that backward needs of a forward of so many rows, logits and loss left out.

    Each layer keeps layer_bytes. With gradient checkpointing it keeps its input alone, and one layer at a time is
    computed again; what that then keeps is counted once, of the largest stack.
    """
    total, again = 0, 0
    for stack in stacks:
        tokens, whole = rows * stack.tokens, rows * layer_bytes(stack.block, stack.tokens, form)
        total += tokens * _outside(stack, form)
        total += stack.layers * (tokens * stack.block.width * form.weights if checkpointing else whole)
        again = max(again, whole if checkpointing else 0)
    return total + again


def layer_bytes(block: Block, tokens: int, form: Form) -> int:
    """The bytes that one layer keeps of one row.

    It is the count of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1: 34 bytes for each token and unit of
    width, and 5 for each head and pair of tokens), term by term as torch's operators save their inputs, for other
    widths, gates, shared keys, dtypes and adapters. With p bytes of a product's operand, r of the residual stream,
    D width, A heads * head_dim, I inner width, T tokens, for each token:

        norms       LayerNorm: r D + 8. RMSNorm: 4 D (its input in float32) + r D where its weight is trained + 4
        inputs      p D of attention and of MLP each; under autocast p D for every linear layer that reads it
        attention   p (2 A + 2 keys) + 4 heads, keys being A, or kv_heads * head_dim where rows are not padded; flash
                    kernels keep nothing of (T, T) but, of padded rows, p T for the mask as numbers. Eager attention
                    has p heads T in place of the 4 heads, and 4 heads T more under autocast; with dropout on a CPU
                    there are three float32 matrices (heads, T), and queries, keys and values in float32
        MLP         p I (activation + 1), and p I * 2 more with a gate
        dropout     D each (p D on a CPU)
        adapters    p rank each

    Not counted: what single operators need for an instant; see working_bytes.
    """
    p, D, A = form.products, block.width, block.heads * block.head_dim
    total = block.norms * _norm(block, form)
    total += _reads(block.attention_readers, D, form) + _reads(block.mlp_readers, D, form)
    total += block.dropouts * D * _dropout(form)
    K = block.kv_heads * block.head_dim
    keys = A if block.masked or block.eager else K
    total += p * (2 * A + 2 * keys) + _scores(block, tokens, form, masked=block.masked)
    if block.qk_norm:
        total += (4 + p) * (A + K) + 4 * (block.heads + block.kv_heads)
    if block.source:
        total += _reads(int(block.cross_reads), D, form) + 2 * p * A + _scores(block, block.source, form)
        total += _norm(block, form) + 2 * p * A * block.source // tokens
    kept = 2 + block.down_reads if block.gated else max(int(block.down_reads), int(not block.activation))
    total += p * block.inner * (block.activation + kept)
    total += p * block.ranks + (p + _dropout(form)) * block.dropped
    return tokens * total


def working_bytes(stacks: Sequence[Stack], form: Form, rows: int) -> int:
    """What backward has at once within one layer, beside what was kept: gradients of (T, I) and of (T, D)."""
    return _at_once(stacks, form, rows, streams=2)


def forward_bytes(stacks: Sequence[Stack], form: Form, rows: int) -> int:
    """What a forward without gradients has at once: the residual stream and one MLP."""
    return _at_once(stacks, form, rows, streams=3)


def _at_once(stacks: Sequence[Stack], form: Form, rows: int, *, streams: int) -> int:
    """Of the layer with the most: the tensors (T, I) of its MLP, and so many (T, D)."""
    each = [
        rows * stack.tokens * (form.products * (3 if stack.block.gated else 2) * stack.block.inner)
        + rows * stack.tokens * form.weights * streams * stack.block.width
        for stack in stacks
    ]
    return max(each, default=0)


def _outside(stack: Stack, form: Form) -> int:
    """For each token: norms and dropouts outside the layers, the output that a head reads, and ids."""
    block = stack.block
    outside = stack.norms * _norm(block, form) + stack.dropouts * block.width * _dropout(form)
    return outside + block.width * form.products + 16


def _norm(block: Block, form: Form) -> int:
    if block.rms:
        return 4 * block.width + (form.weights * block.width if block.norms_trained else 0) + 4
    return form.weights * block.width + 8


def _reads(readers: int, width: int, form: Form) -> int:
    return form.products * width * (readers if form.autocast else min(readers, 1))


def _dropout(form: Form) -> int:
    return form.products if form.on_cpu else 1


def _scores(block: Block, keys: int, form: Form, *, masked: bool = False) -> int:
    """What attention over so many keys keeps for each query beside queries, keys, values and output."""
    p = form.products
    if block.eager:
        probabilities = p + (4 if form.autocast else 0)
        return block.heads * keys * (probabilities + (p + _dropout(form) if block.attention_dropout else 0))
    if form.on_cpu and block.attention_dropout:  # torch has no flash kernel with dropout there, and computes in float32
        return 12 * block.heads * keys + (12 - 3 * p) * block.heads * block.head_dim
    return 4 * block.heads + (p * keys if masked else 0)
