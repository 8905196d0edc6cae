"""What bits/dim to expect from a multiscale network, and how wide it should be for an amount of computation.

L(N, D) = E + A N^−α + B D^−β for N parameters and D images of 32×32 pixels [Hoffmann et al. 2022, §3.3], fitted by
`benchmarks/race.py --fit` to its runs `fast`, `fast-16`, `fast-48` and `fast-64` on CIFAR-10, from 4e12 to 2.6e14
FLOPs. Beyond these it is an extrapolation. Other images have other bits/dim, but the rule still balances the network
against the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# numbers of channels at the first level, in the order in which they are tried; those of the fit are 16, 32, 48 and 64
WIDTHS = (16, 24, 32, 40, 48, 56, 64)


@dataclass(frozen=True)
class ScalingRule:
    """L(N, D) = E + A N^−α + B D^−β in bits/dim, N in millions of parameters, D in millions of images of 32×32.

    Attributes:
        limit_bpd (`float`): E, reached by an endless network and endless data.
        of_parameters_bpd, parameter_exponent (`float`): A and α.
        of_images_bpd, image_exponent (`float`): B and β.
        error_bpd (`float`): root of the sum of the squared residuals of the fit over its degrees of freedom.
    """

    limit_bpd: float
    of_parameters_bpd: float
    parameter_exponent: float
    of_images_bpd: float
    image_exponent: float
    error_bpd: float

    def expected_bpd(self, num_parameters: int, num_images: float) -> float:
        """Held-out bits/dim after training on `num_images` images of 32×32 pixels, each seen once."""
        of_parameters = self.of_parameters_bpd * (num_parameters / 1e6) ** -self.parameter_exponent
        return self.limit_bpd + of_parameters + self.of_images_bpd * (num_images / 1e6) ** -self.image_exponent


# the least and the most FLOPs of the runs that the rule is fitted to
FITTED_FLOPS = (4.08e12, 2.62e14)
RULE = ScalingRule(3.187, 0.1447, 0.4912, 0.03039, 0.529, 0.015)


def best_width(budget: float, cost: Callable[[int], tuple[int, float]]) -> tuple[int, float]:
    """The width of [`WIDTHS`] with the smallest expected bits/dim, and the number of images to train it on.

    Args:
        budget (`float`): what training may cost, such as FLOPs or seconds.
        cost (`Callable`): width → (number of parameters, cost of an image of 32×32). It is called for increasing
            widths, until the expected bits/dim increase.
    """
    best, found = math.inf, (WIDTHS[0], 0.0)
    for width in WIDTHS:
        num_parameters, each = cost(width)
        expected = RULE.expected_bpd(num_parameters, budget / each)
        if expected >= best:
            break
        best, found = expected, (width, budget / each)
    return found
