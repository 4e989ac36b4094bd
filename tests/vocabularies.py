"""What the tests of vocabularies share: tokenizers that differ in known ways, and language models on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[Q]' + message['content'] }}"
    "{% else %}{{ '[A] ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[A]' }}{% endif %}"
)


def changed_vocabulary(folder: Path, into: Path, change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder with its tokenizer.json changed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(into)
    file = into / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(into)


def sentencepiece(words: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before the text, spaces as ▁, bytes for what it does not know; a whole word a token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted({letter for word in words for letter in word})
    merges: list[tuple[str, str]] = []
    whole = list(letters)
    for word in words:
        piece = "▁"
        for letter in word:
            merges.append((piece, letter))
            piece += letter
            whole.append(piece)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *whole]))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=64,
        chat_template=LLAMA_TEMPLATE,
    )


def write_llm(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, columns: int | None = None, width: int = 16, seed: int = 3
) -> Path:
    """A Llama of one layer; columns: of its head, which may be more than there are tokens."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": columns or len(tokenizer), "hidden_size": width, "intermediate_size": 24},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5},
        **{"max_position_embeddings": 96, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
