"""Loads a model that reads images: an encoder-decoder, or a vision-language model."""

import logging
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderConfig,
)

from forge.config.schema import ModelConfig
from forge.errors import UsageError
from forge.model.load import (
    LoadedModel,
    check_embeddings,
    load_whole,
    scratch_config,
)
from forge.model.unused import unused_weights

logger = logging.getLogger(__name__)

ENCODER_DECODER = "vision-encoder-decoder"


def load_recognizer(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, end: int, key: str = "model"
) -> LoadedModel:
    """Return the model of `config`, set up to write with this tokenizer's start, end and padding tokens.

    Args:
        end: the token that a text ends with.

    Raises:
        UsageError: config, checkpoint and tokenizer do not fit each other.
    """
    scratch = None if config.config is None else new_recognizer_config(config.config, tokenizer, key)
    what = "weights for a model that reads images"
    loaded = load_whole(AutoModelForImageTextToText, config, key, what, scratch, may_lack=".pooler.")
    model = loaded.model
    check_embeddings(writer(model).get_input_embeddings(), tokenizer, key)
    _set_special_tokens(model, tokenizer, end, key)
    return loaded


def reads_lines(config: PreTrainedConfig | dict[str, Any]) -> bool:
    """True for an encoder-decoder, which takes no prompt; False for a model that needs one."""
    own = config.get("model_type") if isinstance(config, dict) else config.model_type
    return own == ENCODER_DECODER


def writer(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of the model that writes text."""
    return cast(PreTrainedModel, model.decoder if reads_lines(model.config) else model.get_decoder())


def start_token(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that an encoder-decoder starts a text after."""
    config = None if model is None else model.config
    for token in (
        getattr(config, "decoder_start_token_id", None),
        getattr(getattr(model, "generation_config", None), "decoder_start_token_id", None),
        getattr(getattr(config, "decoder", None), "decoder_start_token_id", None),
        tokenizer.bos_token_id,
        tokenizer.cls_token_id,
        tokenizer.eos_token_id,
    ):
        if token is not None:
            return int(token)
    raise UsageError("the tokenizer has neither a start nor an end token, but a decoder needs one; use another")


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that a text ends with."""
    token = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if token is None:
        raise UsageError("the tokenizer has no end token, but a decoder needs one to stop at; use another")
    return int(token)


def freeze_unused(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[str]:
    """Freeze the weights that no logit depends on, and return their names: data parallelism waits for their gradients.

    These are an encoder's pooler, and what follows the last layer of a vision tower that is read (LLaVA). The autograd
    graph of one row shows them, without a backward pass. The part that writes is left alone: which of its experts are
    used depends on the row.

    Args:
        inputs: one row, for the model's forward.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return []
    training = model.training
    model.eval()  # no layer is dropped
    logits = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=False).logits
    model.train(training)
    writing = {id(parameter) for parameter in writer(model).parameters()}
    weights = dict(model.named_parameters())
    frozen = [name for name in unused_weights(model, logits) if id(weights[name]) not in writing]
    for name in frozen:
        weights[name].requires_grad_(False)
    return frozen


def new_recognizer_config(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase, key: str) -> PreTrainedConfig:
    """Return the transformers config of a model that is built from scratch with the keys of model.config."""
    if not reads_lines(keys):
        return scratch_config(keys, f"{key}.config")
    unknown = sorted(set(keys) - {"model_type", "encoder", "decoder"})
    if unknown:
        raise UsageError(f"{key}.config.{unknown[0]} is not a setting of {ENCODER_DECODER} models: encoder, decoder")
    for part in ("encoder", "decoder"):
        if not isinstance(keys.get(part), dict) or not isinstance(keys[part].get("model_type"), str):
            example = "vit" if part == "encoder" else "trocr"
            raise UsageError(f"{key}.config.{part} is missing or has no model_type, such as {example}")
    start = start_token(None, tokenizer)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end_token(tokenizer),
        "decoder_start_token_id": start,
    }
    encoder = scratch_config(keys["encoder"], f"{key}.config.encoder")
    decoder = scratch_config(keys["decoder"], f"{key}.config.decoder", vocab_size=len(tokenizer), **special)
    # This also makes the decoder one that attends to an encoder.
    whole: PreTrainedConfig = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    whole.decoder_start_token_id = start
    return whole


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: int, key: str) -> None:
    """Set the tokens in the model's config and generation config, as in the transcripts that it is trained on.

    A chat model also stops at the tokens of its checkpoint.
    """
    tokens: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end}
    if reads_lines(model.config):
        tokens["decoder_start_token_id"] = start_token(model, tokenizer)
    else:
        own = getattr(model.generation_config, "eos_token_id", None)
        stops = [] if own is None else [own] if isinstance(own, int) else list(own)
        tokens["eos_token_id"] = own if end in stops else [end, *stops] if stops else end
    for holder in (model.config, model.generation_config):
        for name, value in tokens.items():
            before = getattr(holder, name, None)
            if before not in (None, value):
                logger.warning("%s: %s is %s in its %s, now %s", key, name, before, type(holder).__name__, value)
            setattr(holder, name, value)
