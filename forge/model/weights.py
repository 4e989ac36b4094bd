"""The weights that a training changes, all of a model's or an adapter's: for its checkpoints and its export."""

from abc import ABC, abstractmethod
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from forge.config.schema import ExportConfig
from forge.model.adapter import adapter_config_text, adapter_tensors, config_of_base, is_adapted, load_adapter_tensors
from forge.model.export import MODEL_CONFIG, MergeProof, export_merged, export_model
from forge.model.origin import ADAPTER_CONFIG, BASE_CONFIG, BASE_FILE, Origin
from forge.run.metadata import Merged


class TrainedWeights(ABC):
    """Trained weights under the names that their file gives them."""

    file: str
    base: str | None = None  # the hash of what an adapter is trained on; None: all weights are here

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the model's own tensors, not copies, and none of them twice."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned. Raises RuntimeError for other names or shapes."""

    @abstractmethod
    def texts(self) -> dict[str, str]:
        """Return the small files that from_pretrained needs next to the weights, by name."""

    @abstractmethod
    def export_dtype(self, settings: ExportConfig) -> str:
        """Return the dtype that the exported weights have."""

    @abstractmethod
    def merges(self, settings: ExportConfig) -> bool:
        """True if the export also merges these weights into their base, which needs a MergeProof."""

    @abstractmethod
    def export(
        self,
        folder: Path,
        settings: ExportConfig,
        *,
        state: dict[str, Tensor] | None = None,
        proof: MergeProof | None = None,
    ) -> Merged | None:
        """Write a new folder that from_pretrained loads; return what a merge measured, None if nothing was merged.

        Args:
            state: for a model that is sharded, its whole weights on the CPU, in `export_dtype`.
            proof: required where `merges` is true.
        """


class AllWeights(TrainedWeights):
    """All weights of a model that is trained in full."""

    file = "model.safetensors"

    def tensors(self) -> dict[str, Tensor]:
        """Return the model's own tensors; tied weights once, under the first of their names."""
        tensors = self.model.state_dict()
        aliases = _aliases(tensors)
        return {name: tensor for name, tensor in tensors.items() if name not in aliases}

    def load(self, tensors: dict[str, Tensor]) -> None:
        aliases = _aliases(self.model.state_dict())
        tied = {alias: tensors[name] for alias, name in aliases.items() if name in tensors}
        self.model.load_state_dict({**tensors, **tied}, strict=True)

    def texts(self) -> dict[str, str]:
        return {MODEL_CONFIG: self.model.config.to_json_string()}

    def export_dtype(self, settings: ExportConfig) -> str:
        return settings.dtype

    def merges(self, settings: ExportConfig) -> bool:
        return False

    def export(
        self,
        folder: Path,
        settings: ExportConfig,
        *,
        state: dict[str, Tensor] | None = None,
        proof: MergeProof | None = None,
    ) -> Merged | None:
        export_model(self.model, folder, settings.dtype, state)
        return None


class AdapterWeights(TrainedWeights):
    """The weights of an adapter, which needs the model that it is trained on."""

    file = "adapter_model.safetensors"

    def __init__(self, model: PreTrainedModel, base: Origin):
        super().__init__(model)
        self.base_origin = base
        self.base = base.weights_sha256 or "unknown"

    def tensors(self) -> dict[str, Tensor]:
        return adapter_tensors(self.model)

    def load(self, tensors: dict[str, Tensor]) -> None:
        unexpected = {*(set(adapter_tensors(self.model)) ^ set(tensors)), *load_adapter_tensors(self.model, tensors)}
        if unexpected:
            raise RuntimeError(
                f"{len(unexpected)} tensors of the adapter do not fit the model: {sorted(unexpected)[0]}, …"
            )

    def texts(self) -> dict[str, str]:
        """Return peft's config, forge's record of the base, and the config that the base is loaded with."""
        base = self.base_origin.base
        return {
            ADAPTER_CONFIG: adapter_config_text(self.model, base.location, base.commit or base.revision),
            BASE_FILE: self.base_origin.text(),
            MODEL_CONFIG: config_of_base(self.model).to_json_string(),
        }

    def export_dtype(self, settings: ExportConfig) -> str:
        return "float32"

    def merges(self, settings: ExportConfig) -> bool:
        return settings.merge

    def export(
        self,
        folder: Path,
        settings: ExportConfig,
        *,
        state: dict[str, Tensor] | None = None,
        proof: MergeProof | None = None,
    ) -> Merged | None:
        """Write the adapter as peft does, with the whole model's configs and base.json, and merge it if asked to."""
        folder.mkdir()
        whole = self.tensors() if state is None else state
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
        save_file(tensors, folder / self.file, metadata={"format": "pt"})
        for name, text in self.texts().items():
            (folder / (BASE_CONFIG if name == MODEL_CONFIG else name)).write_text(text)
        if self.model.can_generate():  # it may stop at other tokens than its base
            self.model.generation_config.save_pretrained(folder)
        if not self.merges(settings):
            return None
        assert proof is not None
        return export_merged(folder, self.base_origin, self.model, settings.dtype, proof)


def trained_weights(model: PreTrainedModel, base: Origin | None) -> TrainedWeights:
    """Return the weights of `model` that are trained; base: what its adapter is trained on, if it has one."""
    if not is_adapted(model):
        return AllWeights(model)
    assert base is not None  # an adapter needs a model that can be found again
    return AdapterWeights(model, base)


def _aliases(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the first name of each tied weight, by its later names."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases
