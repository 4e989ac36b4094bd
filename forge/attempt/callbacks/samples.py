"""Keeps the texts that the model generates in evaluations, for people and for programs."""

import json
import logging
from pathlib import Path

from forge.attempt.callbacks.callback import Callback, Samples
from forge.run.directory import RunDirectory
from forge.run.files import publish_folder
from forge.run.state import TrainingState
from forge.task.task import Sample

logger = logging.getLogger(__name__)

SHOWN = 100  # characters of a text in a line of the log


class SamplesFolder(Callback):
    """samples/STAGE-STEP/ with samples.jsonl, the images, and index.md, which shows images and texts."""

    def __init__(self, run: RunDirectory):
        self._folder = run.samples

    def sampled(self, state: TrainingState, stage: str, samples: Samples) -> None:
        for split, rows in samples.items():
            for sample in rows:
                asked = "" if sample.prompt is None else f"{_end(sample.prompt)} -> "
                logger.info(
                    "%s sample, %s row %d: %s%s  (reference %s)",
                    *(stage, split, sample.row, asked, _beginning(sample.prediction), _beginning(sample.reference)),
                )
        self._folder.mkdir(exist_ok=True)
        publish_folder(
            self._folder / f"{stage}-{state.step}", lambda folder: _write(folder, stage, state.step, samples)
        )


def _write(folder: Path, stage: str, step: int, samples: Samples) -> None:
    folder.mkdir()
    lines, pages = [], [f"# {stage} evaluation, step {step}\n"]
    for split, rows in samples.items():
        pages += [f"\n## {split}\n"]
        for sample in rows:
            image = f"{split}-{sample.row}.png" if sample.image is not None else None
            if image is not None and sample.image is not None:
                (folder / image).write_bytes(sample.image)
            texts = {"prompt": sample.prompt, "prediction": sample.prediction, "reference": sample.reference}
            lines.append(json.dumps({"split": split, "row": sample.row, "image": image, **texts}, ensure_ascii=False))
            pages.append(_page(sample, image))
    (folder / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "index.md").write_text("".join(pages), encoding="utf-8")


def _page(sample: Sample, image: str | None) -> str:
    """One row in Markdown, with the texts as code, so that nothing in them is read as markup."""
    picture = f"![row {sample.row}]({image})\n" if image else ""
    texts = {"prompt": sample.prompt, "model": sample.prediction, "reference": sample.reference}
    blocks = "".join(f"\n{name}\n\n{_indented(text)}\n" for name, text in texts.items() if text is not None)
    return f"\n### row {sample.row}\n\n{picture}{blocks}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _beginning(text: str) -> str:
    return json.dumps(text if len(text) <= SHOWN else f"{text[:SHOWN]}…", ensure_ascii=False)


def _end(text: str) -> str:
    """The end of a prompt, which asks the question."""
    return json.dumps(text if len(text) <= SHOWN else f"…{text[-SHOWN:]}", ensure_ascii=False)
