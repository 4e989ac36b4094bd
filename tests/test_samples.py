"""What the model writes is kept with its image, as lines for programs and as a page for people."""

import json
import logging
from pathlib import Path

import pytest

from forge.attempt.callbacks.samples import SamplesFolder
from forge.run.directory import RunDirectory
from forge.run.state import TrainingState
from forge.task.task import Sample

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63f80f0001010100"
    "1bb6ee560000000049454e44ae426082"
)


def test_samples_are_written_once_an_evaluation_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = SamplesFolder(RunDirectory(tmp_path))
    state = TrainingState(run_id="x", step=7)
    line = Sample(3, "TOTAL 5.00", "TOTAL 5.80", image=PNG)
    folder.sampled(state, "baseline", {"near": [Sample(3, "old", "old")]})
    folder.sampled(
        state, "baseline", {"near": [line], "far": [Sample(0, "yes\n", "*no*", prompt="is it?" + "x" * 200)]}
    )

    written = tmp_path / "samples" / "baseline-7"
    assert [json.loads(row) for row in (written / "samples.jsonl").read_text().splitlines()] == [
        {"split": "near", "row": 3, "image": "near-3.png", "prompt": None, "prediction": "TOTAL 5.80",
         "reference": "TOTAL 5.00"},
        {"split": "far", "row": 0, "image": None, "prompt": "is it?" + "x" * 200, "prediction": "*no*",
         "reference": "yes\n"},
    ]  # fmt: skip
    assert (written / "near-3.png").read_bytes() == PNG
    page = (written / "index.md").read_text()
    assert "![row 3](near-3.png)\n\nmodel\n\n    TOTAL 5.80\n\nreference\n\n    TOTAL 5.00\n" in page
    assert "\n    *no*\n" in page
    assert 'baseline sample, near row 3: "TOTAL 5.80"  (reference "TOTAL 5.00")' in caplog.text
    (long,) = [record.getMessage() for record in caplog.records if "far" in record.getMessage()]
    assert long == f'baseline sample, far row 0: "…{"x" * 100}" -> "*no*"  (reference "yes\\n")'
