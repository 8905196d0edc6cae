"""The bound of a data set by Monte Carlo: draws of (t, ε) for each image, at T steps or in continuous time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from ..diffusion import to_high_precision
from ..objectives import VariationalBound
from ..randomness import keyed_generator, keyed_noise
from ..times import importance_warp, lattice_times, loss_level, second_moments
from .rows import (
    Rows,
    batches,
    check_class_labels,
    check_images,
    check_rows_finite,
    device_of,
    evaluating,
    identity_of,
    value_so_far,
)


@dataclass
class BoundEvaluation:
    """The bound of a data set, every image once per repeat.

    Attributes:
        bpd (`float`): mean of the bound over images and repeats, bits/dim.
        stderr_bpd (`float`): standard error of `bpd` as an estimate for *these* images, by the spread of the repeats,
            NaN for a single one. (Images of one repeat share a lattice of t and are not independent.)
        prior_bpd, reconstruction_bpd, diffusion_bpd (`float`): its terms.
        num_images, num_samples (`int`): N, and how many draws of (t, ε, ε_0) each image got.
        num_timesteps (`int` or `None`): T, or `None` for continuous time. No bits/dim without its T.
        variance_per_call (`float`): stderr² times the number of network calls, bits²/dim²; NaN for a single repeat.
        plain_variance_per_call (`float`): the same had each t been drawn by itself, uniform in [0, 1].
        per_image_bpd (`torch.Tensor` of shape `(N,)`): mean over the draws of each image.
        gamma_t, mse, diffusion_terms_bpd (`torch.Tensor` of shape `(num_samples, N)`): draws of the diffusion term,
            with importance sampling divided by the density of t.
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


_COLUMNS = ("prior", "reconstruction", "diffusion", "gamma_t", "mse", "t", "density")
# repeats before a standard error of them is believed enough to stop by it
_MIN_SAMPLES_TO_STOP = 10


@torch.no_grad()
def evaluate_mc(
    bound: VariationalBound,
    images: torch.Tensor,
    *,
    class_labels: torch.Tensor | None = None,
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
) -> BoundEvaluation:
    """Monte-Carlo estimate of the bound over a data set: each image once per repeat, none dropped.

    In a repeat the times of all images form one evenly spread set (a lattice of the golden ratio, randomly shifted).
    Noise is keyed on (seed, repeat, image index), so that the answer does not depend on the batch size.

    Args:
        bound ([`VariationalBound`]): evaluated in `eval()` mode, and put back after.
        images (integer `torch.Tensor` of shape `(N, ...)`): the data set.
        class_labels (`torch.Tensor` of shape `(N,)`, *optional*): handed to the network.
        num_samples (`int`, defaults to 4): repeats K; the error falls as 1/√K.
        target_stderr_bpd (`float`, *optional*): go on with repeats until the standard error is at most this. There
            are at least 10 then, since an error that stops its own measurement must be a good one.
        max_samples (`int`, defaults to 1000): most repeats of `target_stderr_bpd`.
        importance_sampling (`bool`, defaults to `False`): draw t in proportion to √E[loss²] at t, as measured in the
            first quarter of the repeats (2 at least). Unbiased, and better where γ(t) is far from the best one. With
            another number of repeats it is another evaluation, which `resume_dir` does not go on with.
        batch_size (`int`, defaults to 64): how many images go through the network at once.
        seed (`int`, defaults to 0): key of all randomness.
        device (`str` or `torch.device`, *optional*): where to work, defaults to that of the network.
        accelerator (`accelerate.Accelerator`, *optional*): share the images among its processes, which all must call
            this and all get the whole answer, the same as from one process. `bound` must not be wrapped (DDP).
        resume_dir (`str` or `os.PathLike`, *optional*): folder that keeps what is done (a file for each process, once
            a minute and where the work is interrupted). The same call goes on from it; it is left there in the end.
        progress_bar (`bool` or `Callable`, defaults to `True`): show a tqdm bar, or the tqdm-like class to use.

    Returns: [`BoundEvaluation`].
    Raises: `ValueError` for an empty set, a `resume_dir` of another evaluation, and where the network returns NaN,
        with the index of the image.
    """
    if len(images) == 0:
        raise ValueError("images must not be empty: there is no likelihood of nothing.")
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
    check_class_labels(class_labels, images, bound.unet)
    if device is None:
        device = device_of(bound)
    n, pilot = len(images), max(2, num_samples // 4) if importance_sampling else 0
    if target_stderr_bpd is not None:
        num_samples = max(num_samples, min(_MIN_SAMPLES_TO_STOP, max_samples))
    identity = None
    if resume_dir is not None:
        identity = identity_of(bound.unet, bound.noise_schedule, images, class_labels)
        identity |= {"method": "Monte Carlo", "seed": seed, "pilot_samples": pilot}
        identity |= {name: getattr(bound, name) for name in ("num_timesteps", "prediction_type", "num_levels")}
    rows = Rows(len(_COLUMNS), accelerator=accelerator, resume_dir=resume_dir, identity=identity)
    bar_class = progress_bar if callable(progress_bar) else tqdm
    hidden = progress_bar is False or rows.rank > 0
    warp, done = None, 0
    rows.grow(num_samples * n)
    total, running = len(rows.mine(0, num_samples * n)), _Running(rows.values, n)
    with (
        evaluating(bound, rows),
        bar_class(total=total, desc="bits/dim", unit="img", disable=hidden, leave=False) as bar,
    ):
        while True:
            stop = pilot if done < pilot < num_samples else num_samples
            for repeat, index, row in batches(rows.mine(done * n, stop * n), n, batch_size):
                draws = _evaluate_rows(bound, images, class_labels, repeat, index, seed, warp, device)
                rows.values[row] = check_rows_finite(draws, index)
                rows.keep()
                bar.update(len(row))
                bar.set_description(running.text(repeat, draws, rows.world))
            values = rows.share(done * n, stop * n)
            done = stop
            bar.set_description(value_so_far(rows.values[: done * n, :3].sum(1).view(done, n).mean(1)))
            if done == pilot:
                warp = _measured_warp(values[:, _COLUMNS.index("t")], values[:, _COLUMNS.index("diffusion")])
            result = _summarize(rows.values[: done * n].view(done, n, -1), bound.num_timesteps)
            if done == num_samples and target_stderr_bpd is not None and done < max_samples:
                # as many as the error asks for, in at most doublings: the first error is a rough one
                wanted = math.ceil(done * min(result.stderr_bpd / target_stderr_bpd, 2) ** 2)
                if result.stderr_bpd > target_stderr_bpd:
                    num_samples = min(max(wanted, done + 1), 2 * done, max_samples)
                    rows.grow(num_samples * n)
                    bar.total += len(rows.mine(done * n, num_samples * n))
            if done >= num_samples:
                return result


evaluate_bound = evaluate_mc  # the name in earlier versions


class _Running:
    """The value so far and its error, of the rows that this process has."""

    def __init__(self, values: torch.Tensor, n: int):
        totals = values[:, :3].sum(1).view(-1, n)
        self.sums, self.counts = totals.nansum(1).tolist(), (~totals.isnan()).sum(1).tolist()

    def text(self, repeat: int, draws: torch.Tensor, num_processes: int) -> str:
        """With the draws of one more batch."""
        missing = repeat + 1 - len(self.sums)
        self.sums, self.counts = self.sums + [0.0] * missing, self.counts + [0] * missing
        self.sums[repeat] += float(draws[:, :3].sum())
        self.counts[repeat] += len(draws)
        means = torch.tensor([s / c for s, c in zip(self.sums, self.counts, strict=True) if c], dtype=torch.float64)
        return value_so_far(means, num_processes)


def _evaluate_rows(bound, images, class_labels, repeat, index, seed, warp, device) -> torch.Tensor:
    """`_COLUMNS` of some images in one repeat, float64 on the CPU."""
    shift = torch.rand((), generator=keyed_generator(seed, repeat), dtype=torch.float64)
    u = lattice_times(index, shift)
    t, density = (u, torch.ones_like(u)) if warp is None else warp(u)
    x = torch.empty(0, device=device)
    noise = keyed_noise([(seed, repeat, i) for i in index.tolist()], (2, *images.shape[1:]), x)
    labels = None if class_labels is None else class_labels[index].to(device)
    t_device = to_high_precision(t if x.device.type != "mps" else t.float()).to(device)
    out = bound(images[index].to(device), class_labels=labels, t=t_device, eps=noise[:, 0], eps_0=noise[:, 1])
    columns = [out[name].double().cpu() for name in _COLUMNS[:5]]
    columns[2] = columns[2] / density
    return torch.stack([*columns, t, density], 1)


def _measured_warp(t: torch.Tensor, loss: torch.Tensor) -> Callable:
    """[`importance_warp`] by the losses at some times."""
    bins = max(1, min(64, len(t) // 16))
    return importance_warp(loss_level(second_moments(t, loss, bins)))


def _summarize(values: torch.Tensor, num_timesteps: int | None) -> BoundEvaluation:
    """Of the table of shape `(num_samples, N, columns)`."""
    columns = dict(zip(_COLUMNS, values.unbind(-1), strict=True))
    total = columns["prior"] + columns["reconstruction"] + columns["diffusion"]
    samples, n = total.shape
    stderr = float(total.mean(1).std() / math.sqrt(samples)) if samples > 1 else math.nan
    # plain t: E[loss²] is the mean of density · (loss/density)² over t as drawn; (E loss)² without the bias of a mean²
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
    )
