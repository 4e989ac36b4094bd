"""Trains a byte-level BPE tokenizer on the training texts, for a causal LM from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from forge.task.causal_lm.chat import CHATML

PAD, END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def train_bpe(texts: Iterable[str], vocab_size: int, *, chat: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most vocab_size tokens; equal texts give an equal tokenizer.

    Every digit is a token of its own, as in SmolLM2. With `chat` it has the ChatML template, and its end token is the
    end of a turn. It sets no maximum length: the model's positions limit a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END_OF_TURN if chat else END_OF_TEXT,
        additional_special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        chat_template=CHATML if chat else None,
        model_input_names=["input_ids", "attention_mask"],
    )
