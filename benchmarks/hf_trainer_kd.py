"""Distils as users do with transformers' Trainer: both models' whole logits, and two losses on them.

    python benchmarks/hf_trainer_kd.py X.yaml 'JSON list of settings' STEPS OUT.json

kd_step.py starts it. forge loads the task, the student and the teacher, so both loops train the same models on the same
rows. Writes the seconds of each step and the peak memory of the process.
"""

import json
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

from forge.attempt.components import load_components
from forge.cluster.signals import StopRequest
from forge.config.loader import load_config
from forge.data.batches import model_inputs
from forge.losses.cross_entropy import IGNORE
from forge.ranks.world import join_ranks, leave_ranks
from forge.teacher.placement import LoadedTeacher


def main() -> None:
    file, settings, steps, out = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    loaded = load_config(file, settings)
    training, distillation = loaded.config.training, loaded.config.distillation
    parts = load_components(loaded, join_ranks(loaded.config, StopRequest()), [])
    leave_ranks()  # the Trainer makes an Accelerator of its own
    assert isinstance(parts.teacher, LoadedTeacher)
    times = [0.0]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> torch.Tensor:
            given, labels = model_inputs(inputs), inputs["labels"]
            student = model(**given, **parts.task.forward_options).logits
            with torch.no_grad():
                teacher = taught(**given, **parts.task.forward_options).logits
            counted, T = labels != IGNORE, distillation.temperature
            ce = functional.cross_entropy(student.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE)
            kl = functional.kl_div(
                (student.float() / T).log_softmax(-1), (teacher.float() / T).softmax(-1), reduction="none"
            )
            divergence = kl.sum(-1)[counted].mean() * T**2
            return (1 - distillation.alpha) * ce + distillation.alpha * divergence

    arguments = TrainingArguments(
        output_dir=str(out.parent / "hf"),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size or training.per_device_batch_size,
        learning_rate=training.learning_rate,
        bf16=training.mixed_precision == "bf16",
        logging_steps=steps,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=training.seed,
    )
    trainer = Distilling(
        model=parts.student.model,
        args=arguments,
        train_dataset=parts.task.train,  # type: ignore[arg-type]
        data_collator=parts.task.collate,
        callbacks=[Clock()],
    )
    taught = parts.teacher.model.to(trainer.args.device)
    trainer.train()
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    seconds = [after - before for before, after in pairwise(times)]
    out.write_text(json.dumps({"seconds": seconds, "peak_memory_mib": peak}))


if __name__ == "__main__":
    main()
