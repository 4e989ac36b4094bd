"""Rows that turn out unfit only when they are needed: the rank that has them says which, and nothing is lost."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import forge, forge_on_two_ranks
from conversations import config_on, conversation, write_chat_model
from datasets import Dataset

from forge.data.batches import Loading, preparing, row_loader
from forge.errors import UnreadableRows, UsageError
from forge.task.ocr.task import _taken

BAD = {"messages": [{"role": "user", "content": "x"}]}


def test_an_error_is_one_sentence_in_any_process_that_prepares_rows() -> None:
    def broken(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        raise FileNotFoundError(2, "No such file", "a.png")

    def through(workers: int) -> str:
        rows = Dataset.from_dict({"length": [1, 2]})
        loader = row_loader(rows, [[0], [1]], broken, Loading(workers))
        with pytest.raises(UnreadableRows) as caught, preparing("step 3 of 9"):
            next(iter(loader))
        return str(caught.value)

    reason = "FileNotFoundError: [Errno 2] No such file: 'a.png'"
    assert through(0).startswith(f"step 3 of 9 could not be prepared ({reason})")
    assert through(1) == through(0)
    with pytest.raises(UnreadableRows, match=r"prepared \(data, train: row 4 has no reply\);"), preparing("step 1"):
        raise UsageError("data, train: row 4 has no reply")


@pytest.mark.multiprocess
def test_a_rank_other_than_the_first_names_its_own_bad_row(tmp_path: Path) -> None:
    rows = [BAD if i == 13 else conversation(i) for i in range(24)]  # of step 2, on the second rank
    config_on(tmp_path, write_chat_model(tmp_path / "model"), rows, [conversation(0)])
    done = forge_on_two_ranks(
        *("--config", tmp_path / "c.yaml", "--run_name", "r", "--set", "task.dataset.streaming=true"),
        *("--set", "evaluation.baseline=false"),
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert said.count("train: row 13 ends with the role user and not with a reply") == 1
    assert "step 2 of 4 could not be prepared" in said
    assert "Traceback" not in said.split("ChildFailedError")[0].split("Traceback (most recent call last):\n  File")[0]


def test_a_stream_without_anything_to_learn_is_an_error(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "red " * 80}, {"role": "assistant", "content": "one"}]}
    config_on(tmp_path, write_chat_model(tmp_path / "model"), [long] * 9, [conversation(0)])
    settings = ("--set", "task.dataset.streaming=true", "--set", "evaluation.baseline=false")
    done = forge("--config", tmp_path / "c.yaml", "--run_name", "r", *settings)

    assert done.returncode == 1
    assert "no row of the last steps up to 1 has anything to learn" in done.stdout + done.stderr
    (state,) = (tmp_path / "outputs").rglob("training_state.json")
    assert json.loads(state.read_text())["error"].startswith("TrainingError: no row")


def test_an_image_that_the_models_processor_does_not_take_is_found_before_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A scanned line of 6500 x 32 pixels, for Qwen2-VL and others."""
    reader: Any = SimpleNamespace(refusal=lambda size: "ratio above 200" if size[0] > 200 * size[1] else None)
    rows = Dataset.from_dict({"row": [0, 4, 7], "image_size": [[100, 50], [6500, 32], [320, 32]]})
    config: Any = SimpleNamespace(skip_broken=False)
    with pytest.raises(UsageError) as refused:
        _taken(config, reader, rows, "data, train")
    assert (
        "data, train: the model's processor does not take the image of row 4, of 6500 x 32 pixels (ratio above"
        in str(refused.value)
    )
    assert "task.skip_broken: true" in str(refused.value)
    config = SimpleNamespace(skip_broken=True)
    kept, left_out = _taken(config, reader, rows, "data, train")
    assert (kept["row"][:], left_out) == ([0, 7], 1)
    assert "data, train: 1 of 3 images are left out" in caplog.text
    with pytest.raises(UsageError, match="1 of 1 images are refused"):
        _taken(config, reader, rows.select([1]), "data, train")
    assert _taken(config, reader, rows.select([0, 2]), "data, train")[1] == 0
