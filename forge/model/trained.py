"""The weights that a training changes, under the names that files give them: all of a model's, or an adapter's."""

from torch import Tensor
from transformers import PreTrainedModel

from forge.model.adapter import adapter_config_text, adapter_tensors, config_below, is_adapted, load_adapter_tensors
from forge.model.origin import ADAPTER_CONFIG, BASE_FILE, Origin

MODEL_CONFIG = "config.json"


class AllWeights:
    """Of a model that is trained in full."""

    file = "model.safetensors"
    base: str | None = None

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def tensors(self) -> dict[str, Tensor]:
        """The model's own, not copies; tied weights once, under the first of their names."""
        tensors = self.model.state_dict()
        aliases = _aliases(tensors)
        return {name: tensor for name, tensor in tensors.items() if name not in aliases}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises RuntimeError for other names or shapes."""
        aliases = _aliases(self.model.state_dict())
        tied = {alias: tensors[name] for alias, name in aliases.items() if name in tensors}
        self.model.load_state_dict({**tensors, **tied}, strict=True)

    def texts(self) -> dict[str, str]:
        """The small files beside the weights, by name."""
        return {MODEL_CONFIG: self.model.config.to_json_string()}


class AdapterWeights:
    """Of an adapter, which needs the model that it is trained on: `base` is the hash of that one's files."""

    file = "adapter_model.safetensors"

    def __init__(self, model: PreTrainedModel, below: Origin):
        self.model, self.below = model, below
        self.base: str | None = below.weights_sha256 or "unknown"

    def tensors(self) -> dict[str, Tensor]:
        """The model's own, not copies."""
        return adapter_tensors(self.model)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises RuntimeError for other names or shapes."""
        strange = {*(set(adapter_tensors(self.model)) ^ set(tensors)), *load_adapter_tensors(self.model, tensors)}
        if strange:
            raise RuntimeError(f"{len(strange)} tensors of the adapter do not fit the model: {sorted(strange)[0]}, …")

    def texts(self) -> dict[str, str]:
        """The small files beside the weights, by name: peft's, forge's, and the config that the base is loaded with."""
        base = self.below.base
        return {
            ADAPTER_CONFIG: adapter_config_text(self.model, base.location, base.commit or base.revision),
            BASE_FILE: self.below.text(),
            MODEL_CONFIG: config_below(self.model).to_json_string(),
        }


def trained_weights(model: PreTrainedModel, below: Origin | None) -> AllWeights | AdapterWeights:
    """below: what an adapter that is on the model is trained on."""
    if not is_adapted(model):
        return AllWeights(model)
    assert below is not None  # an adapter needs a model that can be found again
    return AdapterWeights(model, below)


def _aliases(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The later names of tied weights, and the first name of each."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases
