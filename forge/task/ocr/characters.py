"""A tokenizer of single characters, for line recognisers that are built from scratch."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0 to 3
PRINTABLE_ASCII = "".join(map(chr, range(32, 127)))  # known whatever the texts: other data can follow


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character and each further one in texts; a text ends with </s>.

    How long a text may be, the model's positions say.
    """
    further = sorted({character for text in texts for character in text} - set(PRINTABLE_ASCII))
    tokens = [*SPECIAL.values(), *PRINTABLE_ASCII, *further]
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = Fuse()
    end = SPECIAL["eos_token"]
    backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokens.index(end))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL)
