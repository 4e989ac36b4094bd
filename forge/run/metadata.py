"""RunMetadata: what run_metadata.json records of a run, from its task, data and models to each attempt's provenance."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from forge.config.former_names import current_headline, current_keys
from forge.run.directory import RunDirectory
from forge.run.files import Guard, unguarded, write_json
from forge.run.provenance import Provenance
from forge.run.records import OpenRecord, Record, read_record

ADVICE = "restore the file, or start a new run under another name"


class TaskFacts(OpenRecord):
    """The kind of task."""

    type: str
    title: str
    pipeline_tag: str
    auto_model: str  # the class in transformers that loads the model
    auto_processing: str  # likewise for its tokenizer or processor
    headline: list[str]  # the metrics that count most
    usage: list[str] = Field(default_factory=list)  # lines of Python for the model card

    @field_validator("headline")
    @classmethod
    def _current_names(cls, headline: list[str]) -> list[str]:
        return current_headline(headline)


class DataFacts(OpenRecord):
    """The rows; a task adds what it has cut or left out."""

    description: str
    fingerprint: str  # of the rows, and of the tokenizer where that decides the tokens
    rows: dict[str, int]  # by split; a stream has no count for train


class WeightFiles(Record):
    """The weights in one folder, or those of one model of the hub."""

    name: str  # as the config had it
    location: str  # an absolute folder, or a hub id
    revision: str | None = None
    commit: str | None = None  # of a hub model, whatever the revision said
    sha256: str | None = None  # None: not known


class AdapterFacts(OpenRecord):
    """A LoRA adapter that is trained."""

    rank: int
    alpha: float | int
    trained_in_full: list[str]  # modules whose own weights are trained
    continues: str | None  # the adapter whose training is continued


class ModelFacts(OpenRecord):
    """A student or a teacher: where its weights come from, and what is trained."""

    source: str
    location: str | None
    revision: str | None
    commit: str | None
    weights_sha256: str | None
    location_sha256: str | None
    adapters: list[WeightFiles]  # merged into the base one after the other
    base_sha256: str | None = None  # what a trained adapter is on
    kept_layers: list[int] | None = None
    layers_of: int | None = None
    parameters: int
    untied: bool = False
    adapter: AdapterFacts | None = None
    trained_parameters: int | None = None
    labels: list[str] = Field(default_factory=list)


class Ancestor(OpenRecord):
    """A run that the weights descend from."""

    role: str
    run_id: str
    name: str
    path: str
    config: str
    weights_sha256: str | None
    steps: int


class World(OpenRecord):
    """The ranks, and how a step is spread over them."""

    ranks: int
    device: str
    mixed_precision: str  # what auto came to
    rows_per_step: int
    micro_batches_per_rank: int | None = None
    deepspeed: dict[str, Any] | None = None  # the plans by model, as DeepSpeed got them


class AttemptRecord(Provenance):
    """One attempt at the run."""

    attempt: int
    ranks: int = Field(ge=1)
    dirty_diff: str | None = None  # the file with what the commit does not have
    changes: list[str] = Field(default_factory=list)  # of the config since the checkpoint it resumed from
    allowed: dict[str, str] = Field(default_factory=dict)  # changes of meaning: key and new value

    @field_validator("allowed")
    @classmethod
    def _current_keys(cls, allowed: dict[str, str]) -> dict[str, str]:
        return current_keys(allowed)


class RunName(Record):
    """Another run."""

    run_id: str
    name: str


class Memory(OpenRecord):
    """The memory that training took, and the estimate."""

    device: str
    predicted_gib: float | None
    measured_gib: float
    measured: str  # how
    measured_gib_by_rank: list[float]
    predicted_parts: dict[str, float] | None


class Merged(OpenRecord):
    """An adapter that was merged into its base for export, as measured on a few rows."""

    dtype: str
    rows: int
    largest_logit: float
    largest_difference: float
    before_rounding: float


class RunMetadata(OpenRecord):
    """What run_metadata.json holds."""

    run_id: str
    name: str
    created_at: str
    config_file: Path
    task: TaskFacts
    data: DataFacts
    model: ModelFacts
    teacher: ModelFacts | None = None
    lineage: list[Ancestor] = Field(default_factory=list)
    world: World
    attempts: list[AttemptRecord] = Field(min_length=1)
    # These come later, or not at all; None is not written.
    control_of: RunName | None = None
    control: RunName | None = None
    memory: Memory | None = None
    merged: Merged | None = None


LATER = ("control_of", "control", "memory", "merged")


def read_metadata(run: RunDirectory) -> RunMetadata:
    """Read run_metadata.json. Raises UsageError, which names the file and the key, if it is not sound."""
    return read_record(RunMetadata, run.metadata_file, ADVICE)


def named(run: RunDirectory) -> RunName:
    """Return the id of a run, and the name that its directory has now."""
    return RunName(run_id=read_metadata(run).run_id, name=run.name)


def write_metadata(run: RunDirectory, metadata: RunMetadata, guard: Guard = unguarded) -> None:
    """Write run_metadata.json, without the keys that a file of an older forge did not have."""
    values = metadata.model_dump(exclude_unset=True)
    write_json(
        run.metadata_file, {key: value for key, value in values.items() if key not in LATER or value is not None}, guard
    )


def amend_metadata(run: RunDirectory, guard: Guard = unguarded, **sections: Record | None) -> RunMetadata:
    """Replace sections of run_metadata.json, or remove them with None, and return what it holds now."""
    metadata = read_metadata(run).model_copy(update=sections)
    write_metadata(run, metadata, guard)
    return metadata
