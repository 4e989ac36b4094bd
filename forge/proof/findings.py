"""What a comparison of two runs found: its parts, how much each compared, and the first difference of each."""

from collections import Counter
from dataclasses import dataclass

from forge.run.records import Record


class Difference(Record):
    """The first place where a part of two runs differs, with both values as text."""

    part: str
    where: str
    unbroken: str
    killed: str

    def __str__(self) -> str:
        return f"{self.where} is {self.unbroken} in the unbroken run and {self.killed} in the killed one"


@dataclass(frozen=True)
class ComparedPart:
    """One part of two runs, compared up to its first difference."""

    name: str
    counts: dict[str, int]  # of the rows, files, tensors and values that were compared
    difference: Difference | None


@dataclass(frozen=True)
class BitComparison:
    """All parts, in the order in which a run makes them: the first difference is the one nearest to its cause."""

    parts: list[ComparedPart]

    @property
    def difference(self) -> Difference | None:
        """The first difference of all; None if the runs are identical."""
        return next((part.difference for part in self.parts if part.difference is not None), None)

    @property
    def counts(self) -> dict[str, int]:
        """How much was compared in all parts together."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.counts)
        return dict(total)
