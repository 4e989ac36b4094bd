"""The mean of a number over seeds, with its 95 % interval."""

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
    """Return the mean of one value per seed, and its interval: mean ± t * s / sqrt(n).

    s is the standard deviation with n - 1 in the denominator, t the 97.5 % quantile of Student's distribution with
    n - 1 degrees of freedom (12.71 for two seeds, 4.30 for three).
    """
    n = len(values)
    if not all(map(math.isfinite, values.values())):
        return Estimate(dict(values), math.nan, None)
    mean = math.fsum(values.values()) / n
    if n == 1:
        return Estimate(dict(values), mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values.values()) / (n - 1)
    return Estimate(dict(values), mean, student_t(n - 1) * math.sqrt(variance / n))


def student_t(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's distribution."""
    from scipy.special import stdtrit  # imported here because it takes a quarter of a second

    return float(stdtrit(degrees, 0.975))
