"""Loads a model that reads images: an encoder-decoder from a checkpoint or from scratch, or a vision-language model."""

import logging
from typing import Any, cast

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

logger = logging.getLogger(__name__)

ENCODER_DECODER = "vision-encoder-decoder"


def load_recognizer(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, key: str = "model") -> LoadedModel:
    """The model of `config`, which writes with this tokenizer and knows its start, end and padding tokens.

    What its forward never uses is frozen. Raises UsageError where config, checkpoint and tokenizer do not fit.
    """
    scratch = None if config.config is None else _scratch_config(config.config, tokenizer, key)
    what = "weights for a model that reads images"
    loaded = load_whole(AutoModelForImageTextToText, config, key, what, scratch, may_lack=".pooler.")
    model = loaded.model
    check_embeddings(writer(model).get_input_embeddings(), tokenizer, key)
    _set_special_tokens(model, tokenizer)
    freeze_unused(model)
    return loaded


def reads_lines(config: PreTrainedConfig | dict[str, Any]) -> bool:
    """True for an encoder-decoder, which is asked nothing; False for a model that is prompted."""
    own = config.get("model_type") if isinstance(config, dict) else config.model_type
    return own == ENCODER_DECODER


def writer(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that writes text."""
    return cast(PreTrainedModel, model.decoder if reads_lines(model.config) else model.get_decoder())


def start_token(config: PreTrainedConfig | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that an encoder-decoder writes after."""
    for token in (
        getattr(config, "decoder_start_token_id", None),
        getattr(getattr(config, "decoder", None), "decoder_start_token_id", None),
        tokenizer.bos_token_id,
        tokenizer.cls_token_id,
        tokenizer.eos_token_id,
    ):
        if token is not None:
            return int(token)
    raise UsageError("the tokenizer has neither a start nor an end token, and a decoder needs one; use another")


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text ends with."""
    token = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if token is None:
        raise UsageError("the tokenizer has no end token, and a decoder needs one to know when to stop; use another")
    return int(token)


def freeze_unused(model: PreTrainedModel) -> list[str]:
    """Freezes the weights that no logit depends on, and names them: data parallelism waits for their gradients.

    They are an encoder's pooler (or pooling head), and in models that read an inner layer of their vision tower
    (LLaVA) all that comes after that layer.
    """
    unused = [".pooler.", ".vision_model.head.", ".vision_tower.head."]
    layer = getattr(model.config, "vision_feature_layer", None)
    if isinstance(layer, int) and layer < -1:
        depth = model.config.vision_config.num_hidden_layers
        unused += [f".layers.{i}." for i in range(depth + layer + 1, depth)] + [".post_layernorm."]
    elif isinstance(layer, int):
        unused += [".post_layernorm."]
    vision = "encoder." if reads_lines(model.config) else "vision_tower."
    frozen = []
    for name, parameter in model.named_parameters():
        inner = name.partition(vision)[2]
        if inner and any(part in f".{vision}{inner}" for part in unused):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def _scratch_config(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase, key: str) -> PreTrainedConfig:
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
    # It also marks the decoder as one that attends to an encoder.
    whole: PreTrainedConfig = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    whole.decoder_start_token_id = start
    return whole


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """In the config and in what generate goes by, where the checkpoint leaves them open."""
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end_token(tokenizer)}
    if reads_lines(model.config):
        tokens["decoder_start_token_id"] = start_token(model.config, tokenizer)
    for holder in (model.config, model.generation_config):
        for name, value in tokens.items():
            if getattr(holder, name, None) is None:
                setattr(holder, name, value)
