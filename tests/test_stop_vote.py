"""The ranks vote on a stop, and on being ready, without waiting for each other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forge.ranks import stop_vote
from forge.ranks.stop_vote import StopVote


class OtherRank:
    """A second rank: its votes, (wants to stop, is ready), are added when the sum is waited for."""

    def __init__(self, *votes: tuple[int, int]):
        self.votes = list(votes)

    def all_reduce(self, votes: torch.Tensor, group: object, async_op: bool) -> Any:
        assert (group, async_op) == ("the patient one", True)
        return SimpleNamespace(wait=lambda: votes.add_(torch.tensor(self.votes.pop(0))))


def vote_beside(other: OtherRank, monkeypatch: pytest.MonkeyPatch) -> tuple[StopVote, Any]:
    monkeypatch.setattr(torch.distributed, "all_reduce", other.all_reduce)
    monkeypatch.setattr(stop_vote, "agreement_group", lambda: "the patient one")
    request = SimpleNamespace(reason=None)
    return StopVote(SimpleNamespace(num_processes=2), request), request  # type: ignore[arg-type]


def test_all_are_ready_only_when_every_rank_is(monkeypatch: pytest.MonkeyPatch) -> None:
    vote, _ = vote_beside(OtherRank((0, 0), (0, 1), (0, 1)), monkeypatch)
    assert vote.cast(ready=True) == (False, False)  # nothing to count yet
    assert vote.cast(ready=False) == (False, False)  # only this rank was
    assert vote.cast(ready=True) == (False, False)  # only the other one was
    assert vote.cast(ready=False) == (False, True)  # both were, at the boundary before


def test_a_stop_of_any_rank_stops_all_at_the_next_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    vote, _ = vote_beside(OtherRank((0, 0), (1, 0)), monkeypatch)
    assert [vote.cast()[0] for _ in range(3)] == [False, False, True]
    other = OtherRank((0, 0), (0, 0))
    vote, request = vote_beside(other, monkeypatch)
    assert vote.cast()[0] is False
    request.reason = "SIGTERM"
    assert vote.cast()[0] is False  # the other rank does not know yet
    assert vote.cast()[0] is True
    assert other.votes == []  # and no vote is left that nobody counts


def test_one_rank_alone_stops_at_once() -> None:
    request = SimpleNamespace(reason=None)
    vote = StopVote(SimpleNamespace(num_processes=1), request)  # type: ignore[arg-type]
    assert (vote.cast(ready=True), vote.cast(ready=False)) == ((False, True), (False, False))
    request.reason = "SIGUSR1"
    assert (vote.cast(), vote.now(), vote.reason()) == ((True, True), True, "SIGUSR1")
