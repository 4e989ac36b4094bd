"""The mean of a few seeds' numbers, and how far another few seeds would move it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half-width of its 95 % interval."""

    values: dict[int, float]  # by seed
    mean: float
    half_width: float | None  # None for one seed, and where a value is not finite

    @property
    def seeds(self) -> int:
        return len(self.values)


def estimate(values: Mapping[int, float]) -> Estimate:
    """mean ± t * s / sqrt(n): s the standard deviation with n - 1, t the 97.5 % quantile of Student's distribution
    with n - 1 degrees of freedom (12.71 for two seeds, 4.30 for three)."""
    n = len(values)
    if not all(map(math.isfinite, values.values())):
        return Estimate(dict(values), math.nan, None)
    mean = math.fsum(values.values()) / n
    if n == 1:
        return Estimate(dict(values), mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values.values()) / (n - 1)
    return Estimate(dict(values), mean, student_t(n - 1) * math.sqrt(variance / n))


def student_t(degrees: int) -> float:
    """The 97.5 % quantile."""
    from scipy.special import stdtrit  # a quarter of a second, and only here

    return float(stdtrit(degrees, 0.975))
