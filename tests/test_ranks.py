"""What the ranks do one after the other is told once."""

import logging
import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forge.errors import ForgeError, Stopped, UsageError
from forge.ranks import accelerator as accelerators
from forge.ranks import agreement
from forge.ranks.agreement import on_rank_0, rank_0_first

logger = logging.getLogger("forge.somewhere")


@pytest.mark.parametrize(("is_main", "told"), [(True, ["two rows are left out", "broken"]), (False, ["broken"])])
def test_a_warning_that_rank_0_has_given_is_not_repeated(
    is_main: bool, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def work(error: Exception | None = None) -> int:
        logger.warning("two rows are left out")
        logger.error("broken")
        if error is not None:
            raise error
        return 3

    accelerator = SimpleNamespace(is_main_process=is_main)
    assert rank_0_first(accelerator, work) == 3  # type: ignore[arg-type]
    assert [record.message for record in caplog.records] == told
    with pytest.raises(UsageError):
        rank_0_first(accelerator, lambda: work(UsageError("bad rows")))  # type: ignore[arg-type]
    logger.warning("one more")
    assert caplog.records[-1].message == "one more"


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What rank 0 has sent to the others: each broadcast puts a value there, or takes it where this is another rank."""
    sent: list[Any] = []

    def broadcast(values: list[Any], src: int, group: object) -> None:
        assert (src, group) == (0, "the patient one")
        if values[0] == (None, None):
            values[0] = sent.pop()
        else:
            sent.append(values[0])

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(agreement, "agreement_group", lambda: "the patient one")
    # Gathered, a value would come back from every rank, padded to the largest: ranks times ranks of it on the wire.
    monkeypatch.setattr(torch.distributed, "all_gather_object", None)
    return sent


def test_what_rank_0_did_is_sent_once_to_each_rank(wire: list[Any]) -> None:
    done = []
    assert on_rank_0(rank(0), lambda: done.append(1) or "a manifest") == "a manifest"
    assert len(wire) == 1
    assert on_rank_0(rank(1), lambda: done.append(2) or "never") == "a manifest"
    assert done == [1]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UsageError("no rows"), UsageError, "no rows"),
        (Stopped("by TERM"), Stopped, "by TERM"),
        (ZeroDivisionError("by zero"), ForgeError, "another rank failed with ZeroDivisionError: by zero"),
    ],
)
def test_an_error_of_rank_0_is_raised_on_every_rank(
    error: Exception, kind: type[Exception], text: str, wire: list[Any]
) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as own:
        on_rank_0(rank(0), work)
    assert own.value is error
    with pytest.raises(kind) as told:
        on_rank_0(rank(1), work)
    assert (type(told.value), str(told.value)) == (kind, text)


@pytest.mark.parametrize(
    ("limits", "count", "asked", "warned"),
    [
        ((1024, 20000), 1, None, False),
        ((1024, 20000), 1024, (2560, 20000), False),
        ((1024, 2000), 1024, (2000, 2000), True),
        ((1024, resource.RLIM_INFINITY), 1024, (2560, resource.RLIM_INFINITY), False),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1024, None, False),
    ],
)
def test_many_ranks_may_open_a_connection_to_each(
    limits: tuple[int, int],
    count: int,
    asked: tuple[int, int] | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda what, to: given.append(to))
    accelerators._raise_file_limit(count)
    assert given == ([] if asked is None else [asked])
    assert ["1024 ranks may need 2560 open files each" in record.message for record in caplog.records] == [
        True
    ] * warned


def rank(number: int) -> Any:
    return SimpleNamespace(is_main_process=number == 0)
