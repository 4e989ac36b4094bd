"""A tokenizer of single characters, for line recognisers that are built from scratch."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0 to 3
PRINTABLE_ASCII = "".join(map(chr, range(32, 127)))  # always known, since other data may follow


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each printable ASCII character and each other one in texts.

    A text ends with </s>. The tokenizer sets no maximum length: the model's positions limit a text.
    """
    further = sorted({character for text in texts for character in text} - set(PRINTABLE_ASCII))
    tokens = [*SPECIAL.values(), *PRINTABLE_ASCII, *further]
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = Fuse()
    end = SPECIAL["eos_token"]
    backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokens.index(end))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL)
