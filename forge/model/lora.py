"""Attaches a new LoRA adapter to a loaded model; it is trained, and so are the weights that no checkpoint has."""

import logging
from dataclasses import replace
from typing import Any

import peft
from accelerate.utils import set_seed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forge.config.schema import LoraConfig, ModelConfig
from forge.errors import UsageError
from forge.model.adapter import adapter_config, attach, is_adapted
from forge.model.load import LoadedModel, not_pooler
from forge.run.metadata import AdapterFacts

logger = logging.getLogger(__name__)

TARGETS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)  # what peft can attach an adapter to
ALL_LINEAR = "all-linear"  # every linear layer except the head over the vocabulary
SHOWN = 40  # names in a message


def with_lora(loaded: LoadedModel, config: ModelConfig, seed: int, key: str = "model") -> LoadedModel:
    """Return the model, with a new adapter if `config` asks for one; its initial weights depend only on the seed.

    Raises:
        UsageError: a target matches no module, or an adapter cannot hold what has to be trained.
    """
    model = loaded.model
    if config.lora is None:
        if not is_adapted(model):
            return loaded
        if missing := not_pooler(loaded.new_weights):  # neither trained nor saved, it would stay random
            raise UsageError(
                f"{key}.continue_adapter: neither the adapter {config.path} nor its base has {missing[0]} "
                f"({len(missing)} weights in all), which would stay random; start a new adapter with {key}.lora, which "
                "trains them too"
            )
        return replace(loaded, adapter=_facts(model, config.adapter or config.path))
    new = _modules_of(model, loaded.new_weights, key)
    asked = _matching(model, config.lora.modules_to_save, nn.Module, f"{key}.lora.modules_to_save")
    saved = list(dict.fromkeys([*new, *asked]))
    targets = [name for name in _targets(model, config.lora, key) if not _within(name, saved)]
    if not targets:
        raise UsageError(f"{key}.lora.target leaves no module to adapt: all of them are trained in full")
    _refuse_running_statistics(model, saved, key)
    set_seed(seed)
    attach(model, _peft_config(config.lora, targets, saved))
    return replace(loaded, adapter=_facts(model, None))


def _targets(model: PreTrainedModel, config: LoraConfig, key: str) -> list[str]:
    """Return the full names of the modules to adapt, in the model's order."""
    named = [name for name in config.target if name != ALL_LINEAR]
    found = _matching(model, named, TARGETS, f"{key}.lora.target")
    if ALL_LINEAR in config.target:
        head = model.get_output_embeddings()
        linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        found += [name for name, module in linear if module is not head]
    used = [name for name in dict.fromkeys(found) if not _is_unused(model.get_submodule(name), model)]
    if found and not used:
        raise UsageError(
            f"{key}.lora.target names only modules that {type(model).__name__} does not use here "
            f"({found[0]}, {len(found)} in all): no output depends on them; name others, or use {ALL_LINEAR}"
        )
    return used


def _is_unused(module: nn.Module, model: PreTrainedModel) -> bool:
    """True if its task has frozen the module: no logit depends on it, so data parallelism would wait for gradients."""
    quantized = getattr(model, "is_quantized", False)  # there all of them are frozen
    return not quantized and not any(parameter.requires_grad for parameter in module.parameters())


def _matching(model: PreTrainedModel, names: list[str], kinds: Any, key: str) -> list[str]:
    """Return the modules whose name is one of `names`, or ends in a dot and one of them."""
    modules = [name for name, module in model.named_modules() if name and isinstance(module, kinds)]
    found = []
    for name in modules:
        if any(name == wanted or name.endswith(f".{wanted}") for wanted in names):
            found.append(name)
    for wanted in names:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
            leaves = list(dict.fromkeys(_leaf(name) for name in modules))
            shown = ", ".join(leaves[:SHOWN]) + (f" and {len(leaves) - SHOWN} more" if len(leaves) > SHOWN else "")
            raise UsageError(f"{key}: no module of {type(model).__name__} is named {wanted}; the names are: {shown}")
    return found


def _modules_of(model: PreTrainedModel, parameters: list[str], key: str) -> list[str]:
    """Return the modules of those parameters that are trained: peft trains only whole modules in full."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if alone := [name for name in parameters if name in trained and "." not in name]:
        raise UsageError(
            f"{key}.lora: {alone[0]} is not in the checkpoint and not in a module of {type(model).__name__}, so an "
            "adapter cannot hold it; train all weights"
        )
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters if name in trained))


def _refuse_running_statistics(model: PreTrainedModel, saved: list[str], key: str) -> None:
    """Raise UsageError for running statistics: training changes them, but no adapter can hold them."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and not _within(name, saved):
            raise UsageError(
                f"{key}.lora: {type(model).__name__} normalizes over batches ({name}), but an adapter cannot "
                f"hold its running statistics; train all weights, or add it to {key}.lora.modules_to_save"
            )


def _peft_config(config: LoraConfig, targets: list[str], saved: list[str]) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a fraction is fine
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=targets,
        modules_to_save=saved or None,
    )


def _facts(model: PreTrainedModel, continues: str | None) -> AdapterFacts:
    """Return what run_metadata.json records of the adapter, and log it."""
    config = adapter_config(model)
    saved = sorted(config.modules_to_save or [])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        "LoRA of rank %d (alpha %g)%s; %s of %s parameters are trained (%.2f %%)",
        config.r,
        config.lora_alpha,
        f", {', '.join(saved)} in full" if saved else "",
        f"{trained:,}",
        f"{total:,}",
        100 * trained / total,
    )
    return AdapterFacts(rank=config.r, alpha=config.lora_alpha, trained_in_full=saved, continues=continues)


def _within(name: str, modules: Any) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
