"""The confidence interval of a run's rate, from the gaps between its units. Five sums serve a run of any length.

A rate is a ratio of sums over units, r = sum(images) / sum(seconds), so its standard error is that of a ratio
estimator (Cochran, Sampling Techniques, 1977, section 2.11), with the residuals e = images - r * seconds:

    se(r) = sqrt(n / (n - 1) * sum(e^2)) / sum(seconds)

The interval is computed on the scale of log r, so that it never reaches 0. It covers the variation within the run, not
the variation between runs, such as a busier machine.
"""

import math
from dataclasses import dataclass

from scipy.special import stdtrit

MIN_GAPS = 3


@dataclass(slots=True)
class Gaps:
    """Sums over the gaps between units. A gap has a length in seconds and the images that were committed at its end."""

    num: int = 0
    seconds: float = 0.0
    images: float = 0.0
    seconds_squared: float = 0.0
    images_squared: float = 0.0
    products: float = 0.0

    def add(self, seconds: float, images: int) -> None:
        """Counts one gap."""
        self.num += 1
        self.seconds += seconds
        self.images += images
        self.seconds_squared += seconds**2
        self.images_squared += images**2
        self.products += seconds * images

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """(low, high) of the rate in images a second; None with fewer than MIN_GAPS gaps, or without images."""
        if self.num < MIN_GAPS or self.seconds <= 0 or self.images <= 0:
            return None
        rate = self.images / self.seconds
        # sum((images - r * seconds)^2), expanded into the sums; rounding may leave it slightly negative
        squares = self.images_squared - 2 * rate * self.products + rate**2 * self.seconds_squared
        error = math.sqrt(max(0.0, squares) * self.num / (self.num - 1)) / self.seconds
        # By the delta method se(log r) = se(r) / r. The cap of 50 keeps exp finite.
        reach = math.exp(min(50.0, float(stdtrit(self.num - 1, (1 + level) / 2)) * error / rate))
        return rate / reach, rate * reach
