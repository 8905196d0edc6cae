"""Monte Carlo estimate of the bound of a data set from draws of (t, ε), with T steps or in continuous time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from ..conditions import check_conditions, rows_of_conditions
from ..diffusion import high_precision_on
from ..objectives import VariationalBound
from ..randomness import keyed_generator, keyed_noise
from ..times import importance_warp, lattice_times, loss_level, second_moments
from .rows import (
    Rows,
    batches,
    check_images,
    check_rows_finite,
    device_of,
    evaluating,
    identity_of,
    progress_text,
)


@dataclass
class BoundEvaluation:
    """The bound of a data set; each repeat uses every image once.

    Attributes:
        bpd (`float`): mean of the bound over images and repeats, bits/dim.
        stderr_bpd (`float`): standard error of `bpd` as an estimate for *these* images, computed from the spread over
            repeats; NaN for a single repeat. (Images of one repeat share a lattice of t and are not independent.)
        prior_bpd, reconstruction_bpd, diffusion_bpd (`float`): the terms of `bpd`.
        num_images, num_samples (`int`): N, and the number of draws of (t, ε, ε_0) per image.
        num_timesteps (`int` or `None`): T, or `None` for continuous time. Always quote bits/dim with T.
        variance_per_call (`float`): stderr² times the number of network calls, bits²/dim²; NaN for a single repeat.
        plain_variance_per_call (`float`): the same for t drawn independently and uniformly from [0, 1].
        per_image_bpd (`torch.Tensor` of shape `(N,)`): mean over the draws of each image.
        gamma_t, mse, diffusion_terms_bpd (`torch.Tensor` of shape `(num_samples, N)`): noise level, squared error and
            diffusion term of each draw; with importance sampling, the terms are divided by the density of t.
        draws_bpd (`torch.Tensor` of shape `(num_samples, N)`): the bound of each draw, whose mean is `per_image_bpd`.
    """

    bpd: float
    stderr_bpd: float
    prior_bpd: float
    reconstruction_bpd: float
    diffusion_bpd: float
    num_images: int
    num_samples: int
    num_timesteps: int | None
    variance_per_call: float
    plain_variance_per_call: float
    per_image_bpd: torch.Tensor = field(repr=False)
    gamma_t: torch.Tensor = field(repr=False)
    mse: torch.Tensor = field(repr=False)
    diffusion_terms_bpd: torch.Tensor = field(repr=False)
    draws_bpd: torch.Tensor = field(repr=False)

    @property
    def per_image_stderr_bpd(self) -> torch.Tensor:
        """Standard error of `per_image_bpd`, `(N,)`, from the spread of the draws; NaN for a single draw.

        The draws of one image are independent: each repeat has its own shift of the times and its own noise.
        """
        return mean_stderr(self.draws_bpd)


def mean_stderr(draws: torch.Tensor) -> torch.Tensor:
    """Standard error of the mean over the first dimension of independent draws, NaN for a single one."""
    if len(draws) < 2:
        return torch.full_like(draws[0], torch.nan)
    return draws.std(0) / math.sqrt(len(draws))


_COLUMNS = ("prior", "reconstruction", "diffusion", "gamma_t", "mse", "t", "density")
# fewest repeats after which their standard error may stop the evaluation
_MIN_SAMPLES_TO_STOP = 10


@torch.no_grad()
def evaluate_mc(
    bound: VariationalBound,
    images: torch.Tensor,
    *,
    num_samples: int = 4,
    target_stderr_bpd: float | None = None,
    max_samples: int = 1000,
    importance_sampling: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
    accelerator: Any = None,
    resume_dir: str | os.PathLike | None = None,
    progress_bar: bool | Callable = True,
    **conditions: torch.Tensor | None,
) -> BoundEvaluation:
    """Monte Carlo estimate of the bound over a data set; each repeat uses every image exactly once.

    In a repeat, the times of all images form one evenly spread set (a randomly shifted golden-ratio lattice). Noise is
    keyed on (seed, repeat, image index), so the result does not depend on the batch size. Two calls with the same seed
    draw the same (t, ε, ε_0) for image i, whatever the models and the images are (but for importance sampling, which
    moves t), so differences between two models have less noise than each of them.

    Args:
        bound ([`VariationalBound`]): evaluated in `eval()` mode; its mode is restored afterwards.
        images (integer `torch.Tensor` of shape `(N, ...)`): the data set.
        num_samples (`int`, defaults to 4): number of repeats K; the standard error falls as 1/√K.
        target_stderr_bpd (`float`, *optional*): add repeats until the standard error is at most this. At least
            10 repeats are made, so that the standard error itself is reliable.
        max_samples (`int`, defaults to 1000): largest number of repeats for `target_stderr_bpd`.
        importance_sampling (`bool`, defaults to `False`): draw t with density proportional to √E[loss²] at t, measured
            in the first quarter of the repeats (at least 2). Unbiased, with lower variance if γ(t) is far from
            optimal. A `resume_dir` with another number of these first repeats is rejected.
        batch_size (`int`, defaults to 64): images per network call.
        seed (`int`, defaults to 0): key of all randomness.
        device (`str` or `torch.device`, *optional*): defaults to the network's device.
        accelerator (`accelerate.Accelerator`, *optional*): shares the images among its processes. All processes must
            call this function; each returns the full result, which equals that of a single process. `bound` must not
            be wrapped (DDP).
        resume_dir (`str` or `os.PathLike`, *optional*): folder for intermediate results (one file per process, saved
            once a minute and on interruption). The same call resumes from it. It is not removed at the end.
        progress_bar (`bool` or `Callable`, defaults to `True`): show a tqdm bar, or the tqdm-like class to use.
        conditions: `class_labels` and the other arguments of conditions.py, with a row for each image, for the bound
            on −log₂ p(x | c); a condition that is not given has its null.

    Returns: [`BoundEvaluation`].
    Raises: `ValueError` for an empty data set or a `resume_dir` of another evaluation, and, with the index of the
        image, if the network returns NaN.
    """
    if len(images) == 0:
        raise ValueError("images must not be empty; pass at least one image.")
    if num_samples < 1 or batch_size < 1 or max_samples < 1:
        raise ValueError(
            f"num_samples, max_samples and batch_size must be at least 1, got {num_samples}, {max_samples} and "
            f"{batch_size}."
        )
    if target_stderr_bpd is not None and num_samples > max_samples:
        raise ValueError(f"max_samples must be at least num_samples={num_samples}, got {max_samples}.")
    if target_stderr_bpd is not None and not target_stderr_bpd > 0:
        raise ValueError(f"target_stderr_bpd must be positive, got {target_stderr_bpd}.")
    check_images(images, bound.num_levels, bound.unet)
    given = check_conditions(bound.unet, len(images), conditions)
    if device is None:
        device = device_of(bound)
    n, pilot = len(images), max(2, num_samples // 4) if importance_sampling else 0
    if target_stderr_bpd is not None:
        num_samples = max(num_samples, min(_MIN_SAMPLES_TO_STOP, max_samples))
    identity = None
    if resume_dir is not None:
        identity = identity_of(bound.unet, bound.noise_schedule, images, given)
        identity |= {"method": "Monte Carlo", "seed": seed, "pilot_samples": pilot}
        identity |= {name: getattr(bound, name) for name in ("num_timesteps", "prediction_type", "num_levels")}
    rows = Rows(len(_COLUMNS), accelerator=accelerator, resume_dir=resume_dir, identity=identity)
    bar_class = progress_bar if callable(progress_bar) else tqdm
    hidden = progress_bar is False or rows.rank > 0
    warp, done = None, 0
    rows.grow(num_samples * n)
    total, running = len(rows.mine(0, num_samples * n)), _RunningMean(rows.values, n)
    with (
        evaluating(bound, rows),
        bar_class(total=total, desc="bits/dim", unit="img", disable=hidden, leave=False) as bar,
    ):
        while True:
            stop = pilot if done < pilot < num_samples else num_samples
            for repeat, index, row in batches(rows.mine(done * n, stop * n), n, batch_size):
                draws = _evaluate_rows(bound, images, given, repeat, index, seed, warp, device)
                rows.values[row] = check_rows_finite(draws, index)
                rows.keep()
                bar.update(len(row))
                bar.set_description(running.text(repeat, draws, rows.world))
            values = rows.share(done * n, stop * n)
            done = stop
            bar.set_description(progress_text(rows.values[: done * n, :3].sum(1).view(done, n).mean(1)))
            if done == pilot:
                warp = _measured_warp(values[:, _COLUMNS.index("t")], values[:, _COLUMNS.index("diffusion")])
            result = _summarize(rows.values[: done * n].view(done, n, -1), bound.num_timesteps)
            if done == num_samples and target_stderr_bpd is not None and done < max_samples:
                # as many as the target needs, but at most twice as many: early standard errors are rough
                wanted = math.ceil(done * min(result.stderr_bpd / target_stderr_bpd, 2) ** 2)
                if result.stderr_bpd > target_stderr_bpd:
                    num_samples = min(max(wanted, done + 1), 2 * done, max_samples)
                    rows.grow(num_samples * n)
                    bar.total += len(rows.mine(done * n, num_samples * n))
            if done >= num_samples:
                return result


evaluate_bound = evaluate_mc  # the name in earlier versions


class _RunningMean:
    """Mean and standard error so far over the rows of this process, for the progress bar."""

    def __init__(self, values: torch.Tensor, n: int):
        totals = values[:, :3].sum(1).view(-1, n)
        self.sums, self.counts = totals.nansum(1).tolist(), (~totals.isnan()).sum(1).tolist()

    def text(self, repeat: int, draws: torch.Tensor, num_processes: int) -> str:
        """Adds the draws of a batch, and returns the text for the progress bar."""
        missing = repeat + 1 - len(self.sums)
        self.sums, self.counts = self.sums + [0.0] * missing, self.counts + [0] * missing
        self.sums[repeat] += float(draws[:, :3].sum())
        self.counts[repeat] += len(draws)
        means = torch.tensor([s / c for s, c in zip(self.sums, self.counts, strict=True) if c], dtype=torch.float64)
        return progress_text(means, num_processes)


def _evaluate_rows(bound, images, conditions, repeat, index, seed, warp, device) -> torch.Tensor:
    """The `_COLUMNS` for a batch of images in one repeat, float64 on the CPU."""
    shift = torch.rand((), generator=keyed_generator(seed, repeat), dtype=torch.float64)
    u = lattice_times(index, shift)
    t, density = (u, torch.ones_like(u)) if warp is None else warp(u)
    x = torch.empty(0, device=device)
    noise = keyed_noise([(seed, repeat, i) for i in index.tolist()], (2, *images.shape[1:]), x)
    given = rows_of_conditions(conditions, index, device)
    t_device = high_precision_on(t, x.device)
    out = bound(images[index].to(device), **given, t=t_device, eps=noise[:, 0], eps_0=noise[:, 1])
    columns = [out[name].cpu().double() for name in _COLUMNS[:5]]
    columns[2] = columns[2] / density
    return torch.stack([*columns, t, density], 1)


def _measured_warp(t: torch.Tensor, loss: torch.Tensor) -> Callable:
    """The [`importance_warp`] for losses measured at times `t`."""
    bins = max(1, min(64, len(t) // 16))
    return importance_warp(loss_level(second_moments(t, loss, bins)))


def _summarize(values: torch.Tensor, num_timesteps: int | None) -> BoundEvaluation:
    """Summarizes the table of shape `(num_samples, N, columns)`."""
    columns = dict(zip(_COLUMNS, values.unbind(-1), strict=True))
    total = columns["prior"] + columns["reconstruction"] + columns["diffusion"]
    samples, n = total.shape
    stderr = float(total.mean(1).std() / math.sqrt(samples)) if samples > 1 else math.nan
    # for uniform t: E[loss²] is the mean of density · (loss/density)² over the drawn t; (E loss)² is bias-corrected
    loss = columns["diffusion"]
    variance = torch.full((n,), torch.nan)
    if samples > 1:
        variance = (columns["density"] * loss.square()).mean(0) - loss.mean(0).square() + loss.var(0) / samples
        variance = variance + columns["reconstruction"].var(0)
    return BoundEvaluation(
        bpd=float(total.mean()),
        stderr_bpd=stderr,
        prior_bpd=float(columns["prior"].mean()),
        reconstruction_bpd=float(columns["reconstruction"].mean()),
        diffusion_bpd=float(columns["diffusion"].mean()),
        num_images=n,
        num_samples=samples,
        num_timesteps=num_timesteps,
        variance_per_call=stderr**2 * samples * n,
        plain_variance_per_call=float(variance.mean()),
        per_image_bpd=total.mean(0),
        gamma_t=columns["gamma_t"],
        mse=columns["mse"],
        diffusion_terms_bpd=columns["diffusion"],
        draws_bpd=total,
    )
