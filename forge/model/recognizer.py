"""Loads a model that reads images: an encoder-decoder from a checkpoint or from scratch, or a vision-language model."""

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

logger = logging.getLogger(__name__)

ENCODER_DECODER = "vision-encoder-decoder"


def load_recognizer(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, end: int, key: str = "model"
) -> LoadedModel:
    """The model of `config`, which writes with this tokenizer and knows its start, end and padding tokens.

    end: the token that a text ends with. Raises UsageError where config, checkpoint and tokenizer do not fit.
    """
    scratch = None if config.config is None else new_recognizer_config(config.config, tokenizer, key)
    what = "weights for a model that reads images"
    loaded = load_whole(AutoModelForImageTextToText, config, key, what, scratch, may_lack=".pooler.")
    model = loaded.model
    check_embeddings(writer(model).get_input_embeddings(), tokenizer, key)
    _set_special_tokens(model, tokenizer, end, key)
    return loaded


def reads_lines(config: PreTrainedConfig | dict[str, Any]) -> bool:
    """True for an encoder-decoder, which is asked nothing; False for a model that is prompted."""
    own = config.get("model_type") if isinstance(config, dict) else config.model_type
    return own == ENCODER_DECODER


def writer(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that writes text."""
    return cast(PreTrainedModel, model.decoder if reads_lines(model.config) else model.get_decoder())


def start_token(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that an encoder-decoder writes after."""
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
    raise UsageError("the tokenizer has neither a start nor an end token, and a decoder needs one; use another")


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text ends with."""
    token = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if token is None:
        raise UsageError("the tokenizer has no end token, and a decoder needs one to know when to stop; use another")
    return int(token)


def freeze_unused(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[str]:
    """Freezes the weights that no logit depends on, and names them: data parallelism waits for their gradients.

    They are an encoder's pooler, and what comes after the layers of a vision tower that are read (LLaVA). inputs: one
    row, whose graph tells them, whatever the architecture; nothing is computed backwards. The part that writes is left
    alone: which of its experts are used depends on the row.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return []
    training = model.training
    model.eval()  # without dropped layers
    logits = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=False).logits
    model.train(training)
    used = _weights_behind(logits) | {id(parameter) for parameter in writer(model).parameters()}
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in used:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def _weights_behind(output: Tensor) -> set[int]:
    """The id of every tensor that would get a gradient from the output's."""
    found: set[int] = set()
    seen: set[Any] = {None}
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the end of the graph, where a gradient is kept
            found.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return found


def new_recognizer_config(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase, key: str) -> PreTrainedConfig:
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


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: int, key: str) -> None:
    """In the config and in what generate goes by: it starts, stops and pads as the transcripts of training do.

    A chat model may also stop where its checkpoint says.
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
