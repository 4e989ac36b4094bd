"""On each of two ranks: trains once for every list of settings, and leaves what it saw of each to the test.

Its arguments: the config, a JSON list of lists of settings, and a folder for what each rank has seen.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from conftest import trainer_of

from forge.config.loader import load_config
from forge.ranks.agreement import gather_values
from forge.ranks.deepspeed import bare


def main() -> None:
    """Losses, norms, final weights, and the bytes of the teacher that this rank holds."""
    file, scenarios, folder = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    rank, found = os.environ["RANK"], []
    environment = dict(os.environ)
    for number, settings in enumerate(scenarios):
        os.environ.clear()
        os.environ |= environment  # of a plan before this one
        trainer = trainer_of(load_config(file, settings).config, folder / rank / str(number))
        live = watch_teacher(trainer)
        at_head = bare(trainer.student).at_head
        registered = len(list(at_head.ds_external_parameters())) if hasattr(at_head, "ds_external_parameters") else 0
        trainer.train()
        seen = {"reports": trainer.attempt.callbacks.reports, "weights": weights(trainer), "held": held(trainer)}
        found.append({**seen, "live": max(live, default=0), "gathered": registered})
        trainer.close()
        gather_values(None)
        trainer.accelerator.free_memory()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def weights(trainer: Any) -> list[float]:
    from forge.ranks.partitions import whole_float32

    trained = trainer.training.named.trained.values()
    return [x for p in trained for x in (whole_float32(p) if trainer.training.partitions else p).flatten().tolist()]


def watch_teacher(trainer: Any) -> list[int]:
    """What becomes of it: the elements of the teacher's weights that are whole on this rank, as each module begins."""
    live: list[int] = []
    model = trainer.teacher.model if trainer.teacher is not None else None

    def look(*_: Any) -> None:
        assert model is not None
        whole = [p for p in model.parameters() if hasattr(p, "ds_id") and p.numel() == p.ds_numel]
        live.append(sum(p.ds_numel for p in whole))

    for module in model.modules() if model is not None else ():
        module.register_forward_pre_hook(look)
    return live


def held(trainer: Any) -> int:
    teacher = trainer.teacher
    if teacher is None:
        return 0
    return sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in teacher.parameters())


if __name__ == "__main__":
    main()
