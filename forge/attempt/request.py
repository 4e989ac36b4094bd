"""What the command line asks of a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.config.loader import LoadedConfig
from forge.config.schema import Config
from forge.run.directory import RunDirectory


@dataclass(frozen=True)
class Request:
    """A new run of a config, or the next attempt at one."""

    loaded: LoadedConfig
    command: Sequence[str]
    run_name: str | None = None
    resumed: RunDirectory | None = None  # None: a new run
    allowed_changes: Sequence[str] = ()  # keys that may change the meaning of a resumed run
    take_over: bool = False  # from a process that is frozen, or on a dead host
    place: Path | None = None  # of a run's control, under the output root; None: as the config's file says
    facts: Mapping[str, Any] = field(default_factory=dict)  # for run_metadata.json, in addition to the run's own

    # Called on rank 0 with the run and its number of steps, once both are known; may raise UsageError.
    before_training: Callable[[RunDirectory, int], None] | None = None

    @property
    def config(self) -> Config:
        return self.loaded.config
