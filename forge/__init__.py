"""forge trains models on many GPUs from one YAML file.

In a notebook or a script:

    import forge

    run = forge.train("configs/quickstart/sft.yaml", {"training.max_steps": 20})
    run.evaluation()["validation/accuracy"]

The names below are loaded when they are first used, so that `import forge` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forge.api import Run, load_config, load_run, resume, train
    from forge.losses.kd_arguments import Computing, Formula, HeadInput, KDLoss, TopK
    from forge.losses.linear_kd import linear_kd
    from forge.losses.logits_kd import logits_kd

__version__ = "0.1.0"
__all__ = [
    "Computing",
    "Formula",
    "HeadInput",
    "KDLoss",
    "Run",
    "TopK",
    "__version__",
    "linear_kd",
    "load_config",
    "load_run",
    "logits_kd",
    "resume",
    "train",
]

_HOMES = {
    **dict.fromkeys(("Run", "load_config", "load_run", "resume", "train"), "forge.api"),
    **dict.fromkeys(("Computing", "Formula", "HeadInput", "KDLoss", "TopK"), "forge.losses.kd_arguments"),
    "linear_kd": "forge.losses.linear_kd",
    "logits_kd": "forge.losses.logits_kd",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
