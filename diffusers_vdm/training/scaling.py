"""What bits/dim to expect from a multiscale network, and its best width and batch for an amount of computation.

L(N, D) = E + A N^−α + B D^−β for N parameters and D images of 32×32 pixels [Hoffmann et al. 2022, §3.3], in batches of
16. Batches of b images, of any size, need more images for the same loss, by the factor (1 + b/b_c)/(1 + 16/b_c) with
the critical batch b_c [McCandlish et al. 2018, §2]. All is fitted by `benchmarks/race.py --fit` to its runs of
`cifar10-fast` with the default learning rate of Muon. Beyond their FLOPs, parameters and batches it is an
extrapolation. Other images have other bits/dim, but the rule still balances the network against the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# numbers of channels at the first level, in the order in which they are tried; those of the fit are 16, 32 and 48
WIDTHS = (16, 24, 32, 40, 48, 56, 64)
# numbers of images per step, in the order in which they are tried; those of the fit are 16, 64 and 128
BATCHES = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ScalingRule:
    """L(N, D) = E + A N^−α + B D^−β in bits/dim, N in millions of parameters, D in millions of images of 32×32.

    Attributes:
        limit_bpd (`float`): E, reached by an endless network and endless data.
        of_parameters_bpd, parameter_exponent (`float`): A and α.
        of_images_bpd, image_exponent (`float`): B and β.
        critical_batch (`float`): b_c, with which twice as many images are needed as with the smallest batches.
        error_bpd (`float`): root of the sum of the squared residuals of the fit over its degrees of freedom.
    """

    limit_bpd: float
    of_parameters_bpd: float
    parameter_exponent: float
    of_images_bpd: float
    image_exponent: float
    critical_batch: float
    error_bpd: float

    def expected_bpd(self, num_parameters: int, num_images: float, batch: int = BATCHES[0]) -> float:
        """Held-out bits/dim after training on `num_images` images of 32×32 pixels, `batch` of them in a step."""
        of_parameters = self.of_parameters_bpd * (num_parameters / 1e6) ** -self.parameter_exponent
        worth = num_images * (1 + BATCHES[0] / self.critical_batch) / (1 + batch / self.critical_batch)
        return self.limit_bpd + of_parameters + self.of_images_bpd * (worth / 1e6) ** -self.image_exponent


# the least and the most FLOPs, parameters and images per step of the runs that the rule is fitted to
FITTED_FLOPS = (1.63e13, 2.62e14)
FITTED_PARAMETERS = (249_531, 2_197_275)
FITTED_BATCHES = (16, 128)
RULE = ScalingRule(2.907, 0.2203, 0.2853, 0.1354, 0.299, 67.43, 0.01)


def best_shape(
    budget: float,
    cost: Callable[[int, int], tuple[int, float] | None],
    widths: Sequence[int] = WIDTHS,
    batches: Sequence[int] = BATCHES,
    processes: int = 1,
) -> tuple[int, int, float]:
    """The width and the batch with the smallest expected bits/dim, and the number of images to train on.

    Args:
        budget (`float`): what training may cost, such as FLOPs or seconds.
        cost (`Callable`): (width, batch of a process) → (number of parameters, cost of an image of 32×32), or `None`
            if that does not fit into memory. It is called for increasing batches at the middle one of `widths`, and
            then for increasing widths, each until the expected bits/dim increase.
        widths, batches (`Sequence[int]`): what may be chosen.
        processes (`int`, defaults to 1): number of batches in a step, of all processes.

    Raises: `ValueError` if nothing fits into memory.
    """

    def expected(width: int, batch: int) -> tuple[float, float]:
        found = cost(width, batch)
        if found is None:
            return math.inf, 0.0
        return RULE.expected_bpd(found[0], budget / found[1], batch * processes), budget / found[1]

    batch = batches[0]
    if len(batches) > 1:  # at the middle width, or the widest one that fits into memory
        for width in reversed(widths[: (len(widths) + 1) // 2]):
            batch, images = _first_minimum(batches, lambda b, width=width: expected(width, b))
            if images:
                break
    width, images = _first_minimum(widths, lambda w: expected(w, batch))
    if not images:
        raise ValueError(
            f"train_batch_size {batch} does not fit into memory with {widths[0]} channels; use a smaller batch, with "
            "gradient_accumulation_steps."
        )
    return width, batch, images


def _first_minimum(choices: Sequence[int], expected: Callable[[int], tuple[float, float]]) -> tuple[int, float]:
    """The choice before the first one that is expected to be worse than the one before it, and its images."""
    best, found = math.inf, (choices[0], 0.0)
    for choice in choices:
        bpd, images = expected(choice)
        if bpd >= best:
            break
        best, found = bpd, (choice, images)
    return found
