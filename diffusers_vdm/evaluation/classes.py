"""Classes of images by their likelihood: the bound of each image under each class, from the same draws of (t, ε).

−log₂ p(x | c) of all classes is estimated with the same times and noise, so the noise of their differences is small,
and only differences decide about a class [Li et al. 2023, §3.2]. Classes that are far behind the best one get no more
draws, and t is drawn more often where classes differ. With p(c), Bayes' rule gives p(c | x); the difference of the
bounds without and with the true class estimates the mutual information I(x; c) in bits.

Papers: Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier" (arXiv 2303.16203); Guo et al. 2017,
"On Calibration of Modern Neural Networks" (arXiv 1706.04599).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from ..conditions import check_conditions
from ..diffusion import high_precision_on
from ..objectives import VariationalBound
from ..randomness import keyed_generator, keyed_noise
from ..times import importance_warp, lattice_times, loss_level, second_moments
from .rows import check_images, check_rows_finite, device_of, evaluation_mode

# draws of all classes before any class is dropped, and bits behind the best one at which it is
_MIN_DRAWS, _HOPELESS_BITS, _STDERRS = 4, 5.0, 3.0
# share of the draws with uniform t, which measure where classes differ
_PILOT_SHARE = 0.25

# limits of a fitted temperature
TEMPERATURES = (0.01, 1e4)


@dataclass
class ClassEvaluation:
    """The bounds of images under each class, K classes.

    Attributes:
        class_bits (`torch.Tensor` of shape `(N, K)`): −log₂ p(x | c), float64. For a class that was dropped, bits of
            the best class plus the mean difference in the draws that both have.
        null_bits (`torch.Tensor` of shape `(N,)` or `None`): −log₂ p(x), of the null class, if it was evaluated.
        num_draws (`torch.Tensor` of shape `(N, K)`): draws of each image and class.
        num_calls (`int`): network calls for one image, of all images, classes and draws.
        num_dimensions (`int`): values of an image.
    """

    class_bits: torch.Tensor = field(repr=False)
    null_bits: torch.Tensor | None = field(repr=False)
    num_draws: torch.Tensor = field(repr=False)
    num_calls: int
    num_dimensions: int

    def probabilities(self, prior: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """p(c | x) ∝ (p(c) p(x | c))^{1/temperature}: `(N, K)`; `prior`, of shape `(K,)`, defaults to equal ones."""
        return class_probabilities(self.class_bits, prior, temperature)

    def mutual_information(self, class_labels: torch.Tensor) -> tuple[float, float]:
        """I(x; c) in bits, the mean of log₂ p(x | c) − log₂ p(x), and its standard error for the population of images.

        p(x) is the bound of the null class. The result is I(x; c) if both bounds are as far from the truth. It is too
        large if the network was trained on fewer images without their class than with it, as by a small
        `--condition_dropout`. [`information_bound`] is never too large.

        Raises: `ValueError` if the null class was not evaluated.
        """
        if self.null_bits is None:
            raise ValueError("null_bits must be known, got None; evaluate with with_null=True.")
        if not torch.is_tensor(class_labels) or class_labels.shape != self.null_bits.shape:
            raise ValueError(f"class_labels must be a tensor of the classes of all {len(self.null_bits)} images.")
        own = self.class_bits.gather(1, class_labels.long().view(-1, 1))[:, 0]
        difference = self.null_bits - own
        error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else math.nan
        return float(difference.mean()), error


@torch.no_grad()
def evaluate_classes(
    bound: VariationalBound,
    images: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
    with_null: bool = False,
    num_samples: int = 32,
    rejection: bool = True,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    accelerator: Any = None,
    progress_bar: bool | Callable = True,
) -> ClassEvaluation:
    """The bound of each image under each class of a class-conditional network.

    A draw of (t, ε, ε_0) of an image is the same for all classes. The times of an image form a golden-ratio lattice,
    warped so that more of them are where the classes differ, as measured in the first quarter of the draws. Noise is
    keyed on (seed, draw, image index), so the result does not depend on the batch size and on the number of processes.

    Args:
        bound ([`VariationalBound`]): evaluated in `eval()` mode; its mode is restored afterwards.
        images (integer `torch.Tensor` of shape `(N, C, H, W)`): the images.
        class_labels (`torch.Tensor` of shape `(N,)`, *optional*): the true classes, which are never dropped, so that
            their bits have all draws.
        with_null (`bool`, defaults to `False`): also evaluate the null class, for the mutual information.
        num_samples (`int`, defaults to 32): draws of (t, ε) for each image.
        rejection (`bool`, defaults to `True`): drop a class of an image once it is, by three standard errors, more
            than 5 bits behind the best one, and stop when one class is left.
        batch_size (`int`, defaults to 256): pairs of image and class per network call.
        seed (`int`, defaults to 0): key of all randomness.
        device (`str` or `torch.device`, *optional*): defaults to the network's device.
        accelerator (`accelerate.Accelerator`, *optional*): shares the images among its processes. All processes must
            call this function with the same arguments, and all get the result.
        progress_bar (`bool` or `Callable`, defaults to `True`): show a tqdm bar, or the tqdm-like class to use.

    Returns: [`ClassEvaluation`].
    Raises: `ValueError` for a network without classes or, with `with_null`, without a null class; for no images, and
        for labels that are not classes; and, with the index of the image, if the network returns NaN.
    """
    config: Any = getattr(bound.unet, "config", None) or {}
    num_classes = config.get("num_class_embeds")
    if num_classes is None:
        raise ValueError("bound.unet must have classes, got num_class_embeds=None; train a network with classes.")
    if with_null and not config.get("null_class", False):
        raise ValueError("with_null needs a network with a null class, got null_class=False.")
    if len(images) == 0:
        raise ValueError("images must not be empty; pass at least one image.")
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}.")
    check_images(images, bound.num_levels, bound.unet)
    if class_labels is not None:
        check_conditions(bound.unet, len(images), {"class_labels": class_labels})
        if len(class_labels) and int(class_labels.max()) >= num_classes:
            raise ValueError(f"class_labels must be within [0, {num_classes}), got {int(class_labels.max())}.")
    device = device_of(bound) if device is None else torch.device(device)
    n, dims = len(images), images[0].numel()
    shifts = torch.stack([torch.rand((), generator=keyed_generator(seed, "classes", i)).double() for i in range(n)])
    bits = torch.full((num_samples, n, num_classes + with_null), torch.nan, dtype=torch.float64)
    shared = torch.zeros(num_samples, n, dtype=torch.float64)  # prior and reconstruction, which have no class
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    active = torch.zeros(n, num_classes + with_null, dtype=torch.bool)
    active[rank::world] = True
    kept = torch.zeros_like(active)
    kept[:, num_classes:] = True
    if class_labels is not None:
        kept[torch.arange(n), class_labels.long().cpu()] = True
    times = torch.zeros(num_samples, n, dtype=torch.float64)
    pilot, warp = max(1, round(_PILOT_SHARE * num_samples)), None
    bar_class = progress_bar if callable(progress_bar) else tqdm
    with (
        evaluation_mode(bound),
        bar_class(
            total=num_samples * int(active.sum()), desc="classes", disable=progress_bar is False, leave=False
        ) as bar,
    ):
        for draw in range(num_samples):
            u = lattice_times(torch.full((n,), draw), shifts)
            times[draw], density = (u, torch.ones_like(u)) if warp is None else warp(u)
            for pairs in active.nonzero().split(batch_size) if bool(active.any()) else ():
                index, labels = pairs.unbind(1)
                out = _bound_of_pairs(bound, images, index, labels, times[draw], density, (seed, draw), device)
                terms = [out["diffusion"], out["prior"] + out["reconstruction"]]
                terms = check_rows_finite(dims * torch.stack(terms, dim=1).double().cpu(), index)
                bits[draw, index, labels], shared[draw, index] = terms.unbind(1)
            bar.update(len(range(rank, n, world)) * active.shape[1])
            if draw + 1 == pilot:  # before any class is dropped, and before any process has ended
                differences = _shared(bits[:pilot, :, :num_classes], rank, accelerator)
                warp = _warp_of_differences(times[:pilot], differences)
            if rejection and draw + 1 >= _MIN_DRAWS and draw + 1 >= pilot:
                active &= kept | ~_hopeless(bits[: draw + 1, :, :num_classes], active)
                alone = (active[:, :num_classes].sum(1) == 1) & ~kept.any(1)
                active[alone] = False
                if not bool(active.any()):
                    break
    bits, shared = _shared(bits, rank, accelerator), _shared(shared[..., None], rank, accelerator)[..., 0]
    num_draws = (~bits.isnan()).sum(0)
    total = _combined(bits, num_classes) + (shared.sum(0) / num_draws.amax(1))[:, None]
    null = total[:, num_classes] if with_null else None
    return ClassEvaluation(total[:, :num_classes], null, num_draws[:, :num_classes], int(num_draws.sum()), dims)


def class_probabilities(
    class_bits: torch.Tensor, prior: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """p(c | x) ∝ (p(c) 2^{−bits})^{1/temperature} for the bits of each class, `(N, K)`; equal p(c) without `prior`."""
    log_joint = -math.log(2) * class_bits
    if prior is not None:
        if prior.shape != class_bits.shape[1:] or not bool((prior > 0).all()):
            raise ValueError(
                f"prior must be {class_bits.shape[1]} positive probabilities, one of each class, got {prior.tolist()}."
            )
        log_joint = log_joint + prior.double().log()
    return torch.softmax(log_joint / temperature, dim=1)


def information_bound(
    probabilities: torch.Tensor, class_labels: torch.Tensor, prior: torch.Tensor | None = None
) -> tuple[float, float]:
    """A lower bound of I(x; c) in bits, E[log₂ q(c | x) − log₂ p(c)] [Barber & Agakov 2003], and its standard error.

    It is below I(x; c) for any q, by the mean of KL(p(c | x) ‖ q(c | x)), and at most the entropy of c.

    Args:
        probabilities (`torch.Tensor` of shape `(N, K)`): q(c | x), not fitted to these labels.
        class_labels (`torch.Tensor` of shape `(N,)`): the true classes.
        prior (`torch.Tensor` of shape `(K,)`, *optional*): p(c), such as the frequencies of these labels, whose
            entropy is then the largest possible result; equal ones if not given.
    """
    labels, (n, num_classes) = class_labels.long(), probabilities.shape
    p = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64) if prior is None else prior.double()
    found = probabilities.double()[torch.arange(n), labels].clamp(min=1e-300)
    bits = found.log2() - p[labels].log2()
    return float(bits.mean()), float(bits.std() / math.sqrt(n)) if n > 1 else math.nan


def fit_temperature(class_bits: torch.Tensor, class_labels: torch.Tensor, prior: torch.Tensor | None = None) -> float:
    """The temperature of [`class_probabilities`] that makes these labels most probable [Guo et al. 2017, §4.2].

    The estimated bits have noise, and are bounds, so p(c | x) at temperature 1 is too sure. Fit it on other images
    than those whose probabilities are used.

    Args:
        class_bits (`torch.Tensor` of shape `(N, K)`): see [`ClassEvaluation`].
        class_labels (`torch.Tensor` of shape `(N,)`): the true classes.
        prior (`torch.Tensor` of shape `(K,)`, *optional*): p(c).

    Returns: a `float` within `TEMPERATURES`, [0.01, 10000]; labels that are all right, or none, have no best one.
    """
    rows = torch.arange(len(class_bits))

    def loss(log_temperature: float) -> float:
        p = class_probabilities(class_bits, prior, math.exp(log_temperature))
        return -float(p[rows, class_labels.long()].clamp(min=1e-300).log().mean())

    low, high = map(math.log, TEMPERATURES)  # the loss is convex in 1/temperature, so it has one minimum
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return math.exp(0.5 * (low + high))


def calibration_error(probabilities: torch.Tensor, class_labels: torch.Tensor, num_bins: int = 15) -> float:
    """Expected calibration error: Σ_b |B_b|/N · |accuracy − mean confidence| over equal bins of the confidence
    [Guo et al. 2017, eq. 3].

    Args:
        probabilities (`torch.Tensor` of shape `(N, K)`): p(c | x).
        class_labels (`torch.Tensor` of shape `(N,)`): the true classes.
        num_bins (`int`, defaults to 15): bins of [0, 1].
    """
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == class_labels).double()
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, correct - confidence)
    return float(gaps.abs().sum() / len(confidence))


def _bound_of_pairs(bound, images, index, labels, t, density, key, device) -> Any:
    """The bound of pairs of image and class in one draw; pairs of one image share its noise."""
    used, which = index.unique(return_inverse=True)
    noise = keyed_noise([(*key, i) for i in used.tolist()], (2, *images.shape[1:]), torch.empty(0, device=device))
    noise = noise[which.to(noise.device)]
    return bound(
        images[index].to(device),
        class_labels=labels.to(device),
        t=high_precision_on(t[index], device),
        t_density=density[index].to(device),
        eps=noise[:, 0],
        eps_0=noise[:, 1],
    )


def _shared(values: torch.Tensor, rank: int, accelerator: Any) -> torch.Tensor:
    """`values`, `(draws, N, K)`, with the images of each process: image i is that of process i mod their number."""
    if accelerator is None or accelerator.num_processes == 1:
        return values
    mine = torch.zeros_like(values)
    mine[:, rank :: accelerator.num_processes] = values[:, rank :: accelerator.num_processes]
    both = torch.stack([mine.nan_to_num(), mine.isnan().double()])  # a sum of numbers and zeros is exact
    found, missing = accelerator.reduce(high_precision_on(both, accelerator.device), "sum").double().cpu()
    return torch.where(missing > 0, torch.nan, found)


def _warp_of_differences(t: torch.Tensor, bits: torch.Tensor) -> Callable:
    """The [`importance_warp`] for the spread of the classes: uniform `t`, `(draws, N)`, bits `(draws, N, K)`."""
    spread = bits.std(-1) if bits.shape[-1] > 1 else torch.ones_like(t)
    bins = max(1, min(32, t.numel() // 16))
    return importance_warp(loss_level(second_moments(t.flatten(), spread.flatten(), bins)))


def _hopeless(bits: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Which classes are surely far behind the best one; shape of `active`, the null class never is."""
    draws, _, num_classes = bits.shape
    means = torch.where(active[:, :num_classes], bits.mean(0), math.inf)
    best = means.argmin(1)[None, :, None].expand(draws, -1, 1)
    behind = bits - bits.gather(2, best)
    surely = behind.mean(0) - _STDERRS * behind.std(0) / math.sqrt(draws)
    hopeless = torch.zeros_like(active)
    hopeless[:, :num_classes] = surely > _HOPELESS_BITS
    return hopeless


def _combined(bits: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Mean bits of each class: those of the best one, plus the mean difference in the draws that both have."""
    num_draws = (~bits[:, :, :num_classes].isnan()).sum(0)
    means = bits.nanmean(0)
    complete = num_draws == num_draws.amax(1, keepdim=True)
    best = torch.where(complete, means[:, :num_classes], math.inf).argmin(1)
    of_best = bits.gather(2, best[None, :, None].expand(len(bits), -1, 1))
    return means.gather(1, best[:, None]) + (bits - of_best).nanmean(0)
