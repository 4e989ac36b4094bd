"""What a notebook or a job script leaves in the environment is named before a library stumbles over it."""

import os
from pathlib import Path

import pytest

from forge.cli.main import main
from forge.cluster.processes import check_launcher_variables, rank, world_size
from forge.errors import UsageError
from forge.ranks import deepspeed
from forge.ranks.world import leave_ranks

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("left", "sentence"),
    [
        (
            {"LOCAL_RANK": "0"},
            "the environment has LOCAL_RANK=0 without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, which",
        ),
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2 without RANK, LOCAL_RANK"),
        ({**WHOLE, "RANK": "one"}, "the environment has RANK=one, which is not a number"),
        ({**WHOLE, "RANK": ""}, "the environment has RANK=, which is not a number"),
        ({**WHOLE, "RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
    ],
)
def test_a_part_of_what_a_launcher_sets_is_refused(
    left: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert (rank(), world_size()) == (2 if left.get("RANK") == "2" else 0, int(left.get("WORLD_SIZE", 1)))
    with pytest.raises(UsageError, match="unset") as caught:
        check_launcher_variables()
    assert sentence in str(caught.value)


def test_what_a_launcher_sets_and_nothing_at_all_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    check_launcher_variables()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    check_launcher_variables()  # the address alone is what many job scripts export


def test_the_command_says_it_in_one_sentence(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--config", str(config_file)]) == 2
    shown = capfd.readouterr().err
    assert "ERROR: the environment has LOCAL_RANK=0" in shown
    assert "Traceback" not in shown


def test_what_deepspeed_needs_in_one_process_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("RANK", raising=False)
    before = dict(os.environ)
    deepspeed._set({"ACCELERATE_USE_CPU": None, "RANK": "0"})
    deepspeed._set({"RANK": "1"})
    assert (os.environ["RANK"], "ACCELERATE_USE_CPU" in os.environ) == ("1", False)
    leave_ranks()
    assert dict(os.environ) == before
