"""How sure a figure is: intervals by the bootstrap, paired differences, and the words that follow from them.

Every figure of an evaluation is made of sums over rows (a perplexity of losses and tokens, a BLEU of n-gram
counts). Rows are drawn anew, with replacement, thousands of times, and the figure is made from each draw; the
middle 95 % of the values are its interval. For a difference both models see the same draws, so that what is easy
or hard about a row cancels out.

Percentile intervals are too narrow with few rows; the percentiles are moved outward so that they match Student's t
for means (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 5.3). Below `FEWEST` rows no
interval is given, and no difference is called one unless at least so many rows differ: with five rows even a
sign test cannot reach 5 % (2 · 0.5^5 = 6 %).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 6

HIGHER, LOWER = "higher", "lower"
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"


@dataclass(frozen=True)
class Sample:
    """What a figure is made of.

    Attributes:
        columns: (rows, k) numbers of each row.
        combine: makes the figure from sums over rows: (…, k) → (…).
        share: whether the columns are (0 or 1, 1), so that the figure is a share of rows.
    """

    columns: "np.ndarray"
    combine: "Callable[[np.ndarray], np.ndarray]"
    share: bool = False

    @property
    def value(self) -> float:
        """The figure itself."""
        return float(self.combine(self.columns.sum(axis=0)))

    def of(self, rows: Sequence[int]) -> "Sample":
        """The same measure of some of the rows."""
        return Sample(self.columns[list(rows)], self.combine, self.share)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; no interval (None) where there are too few rows."""

    value: float
    low: float | None
    high: float | None
    rows: int


@dataclass(frozen=True)
class Difference:
    """A figure minus the baseline's on the same rows.

    Attributes:
        differing: rows in which the two are not the same.
        verdict: `BETTER`, `WORSE` or `NO_DIFFERENCE`; None for a figure of which neither more nor less is better.
    """

    value: float
    low: float | None
    high: float | None
    rows: int
    differing: int
    verdict: str | None


class Bootstrap:
    """Draws rows; the same seed gives the same draws.

    Args:
        seed: of the draws.
        resamples: how many.
    """

    def __init__(self, seed: int, resamples: int = RESAMPLES) -> None:
        self._seed, self._resamples = seed, resamples
        self._draws: dict[int, np.ndarray] = {}

    def estimate(self, sample: Sample) -> Estimate:
        """A figure with its interval."""
        rows = len(sample.columns)
        if rows == 0:
            return Estimate(math.nan, None, None, 0)
        if sample.share and sample.value in (0.0, 1.0) and rows >= FEWEST:
            # Rows that are all the same show the bootstrap no variation; the exact bound (Clopper and Pearson, 1934).
            reach = 1 - ((1 - CONFIDENCE) / 2) ** (1 / rows)
            low, high = (0.0, reach) if sample.value == 0 else (1 - reach, 1.0)
            return Estimate(sample.value, low, high, rows)
        low, high = self._interval(rows, self._values(sample))
        return Estimate(sample.value, low, high, rows)

    def difference(self, sample: Sample, baseline: Sample, better: str | None) -> Difference:
        """A figure minus the baseline's, row by row paired.

        Args:
            better: `HIGHER`, `LOWER`, or None.
        """
        import numpy as np

        rows = len(sample.columns)
        if rows == 0:
            return Difference(math.nan, None, None, 0, 0, better and NO_DIFFERENCE)
        differing = int((~np.isclose(sample.columns, baseline.columns, rtol=1e-9, atol=0)).any(axis=1).sum())
        low, high = self._interval(rows, self._values(sample) - self._values(baseline))
        value = sample.value - baseline.value
        return Difference(value, low, high, rows, differing, better and _verdict(low, high, differing, better))

    def _values(self, sample: Sample) -> "np.ndarray":
        return sample.combine(self._weights(len(sample.columns)) @ sample.columns)

    def _weights(self, rows: int) -> "np.ndarray":
        """(resamples, rows): how often each row was drawn."""
        import numpy as np

        if rows not in self._draws:
            random = np.random.default_rng([self._seed, rows])
            counts = random.multinomial(rows, np.full(rows, 1 / rows), size=self._resamples)
            self._draws[rows] = counts.astype(np.float32)
        return self._draws[rows]

    def _interval(self, rows: int, values: "np.ndarray") -> tuple[float | None, float | None]:
        import numpy as np

        values = values[np.isfinite(values)]
        if rows < FEWEST or not len(values):
            return None, None
        tail = _outer_tail(rows)
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)


def ratio(sums: "np.ndarray") -> "np.ndarray":
    """The first sum over the second: a mean, a share."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def exp_ratio(sums: "np.ndarray") -> "np.ndarray":
    """A perplexity, of summed losses in nats and tokens."""
    import numpy as np

    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def ratio_sample(
    pairs: Iterable[tuple[float, float]], combine: "Callable[[np.ndarray], np.ndarray]" = ratio, share: bool = False
) -> Sample:
    """A figure made of two numbers of each row."""
    import numpy as np

    return Sample(np.array(list(pairs), dtype=float).reshape(-1, 2), combine, share)


def share_sample(hits: Iterable[bool]) -> Sample:
    """The share of rows that are hits."""
    return ratio_sample(((float(hit), 1.0) for hit in hits), share=True)


def plain(figure: Estimate | Difference) -> dict[str, Any]:
    """For JSON, which knows no NaN: None in its place. Eight digits are more than any figure means."""
    return {
        name: (float(f"{value:.8g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in asdict(figure).items()
    }


def _outer_tail(rows: int) -> float:
    """The share to cut at each end so that an interval of means is as wide as Student's."""
    normal = NormalDist()
    z, freedom = normal.inv_cdf(1 - (1 - CONFIDENCE) / 2), rows - 1
    # Student's quantile from the normal one (Abramowitz and Stegun, 26.7.5); within 0.1 % from 5 degrees on.
    t = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return normal.cdf(-math.sqrt(rows / freedom) * t)


def _verdict(low: float | None, high: float | None, differing: int, better: str) -> str:
    if low is None or high is None or differing < FEWEST or low <= 0 <= high:
        return NO_DIFFERENCE
    return BETTER if (low > 0) == (better == HIGHER) else WORSE
