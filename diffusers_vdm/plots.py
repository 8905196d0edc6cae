"""Plots of a model: its schedule, its training, its loss over γ, and grids and animations of samples."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from . import diffusion
from .noise_schedules import NoiseSchedule

# at most as many points on a curve over γ
_POINTS = 40


def image_grid(
    images: torch.Tensor, columns: int | None = None, scale: int | None = None, gap: int = 1
) -> Image.Image:
    """A grid of images, enlarged without smoothing so that each pixel is visible.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): values in [0, 1], with 1 or 3 channels.
        columns (`int`, *optional*): images per row, defaults to a square grid.
        scale (`int`, *optional*): enlargement factor, defaults to about 64 pixels per image.
        gap (`int`, defaults to 1): space between the images, in pixels before enlargement.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must have shape (N, 1 or 3, H, W), got {tuple(images.shape)}.")
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    scale = scale or max(1, round(64 / max(height, width)))
    canvas = torch.ones(channels, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i, image in enumerate(images.cpu().float().clamp(0, 1)):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    pixels = (canvas * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike, seconds: float = 4.0) -> None:
    """Saves frames as a GIF that lasts about `seconds` and pauses on the last frame."""
    if not frames:
        raise ValueError("frames must not be empty.")
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [each] * (len(frames) - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def plot_schedule(noise_schedule: NoiseSchedule, path: str | os.PathLike, title: str = "") -> None:
    """Plots γ(t) with the straight line between its ends, and α² and σ² over t."""
    figure, (left, right) = _figure(2)
    device = next((p.device for p in noise_schedule.parameters()), None)
    t = torch.linspace(0, 1, 401, dtype=torch.float64, device=device)
    with torch.no_grad():
        gamma = noise_schedule(t).cpu()
    t = t.cpu()
    left.plot(t, gamma, label=type(noise_schedule).__name__)
    left.plot([0, 1], [gamma[0], gamma[-1]], ":", color="gray", label="straight line")
    left.set(xlabel="t", ylabel="γ = −log SNR")
    right.plot(t, diffusion.alpha(gamma) ** 2, label="α²  (data)")
    right.plot(t, diffusion.sigma(gamma) ** 2, label="σ²  (noise)")
    right.set(xlabel="t", ylabel="fraction of the power")
    for axes in (left, right):
        axes.legend(frameon=False)
    _save(figure, path, title)


def plot_training(lines: Sequence[dict[str, Any]], path: str | os.PathLike, title: str = "") -> None:
    """Plots the loss and the held-out bits/dim, with error bars, over the steps of `metrics.jsonl`, and the speed.

    A line joins held-out bits/dim of the same number of images and draws only. The first tenth of the steps, where
    the loss falls steeply, may lie outside the axes.
    """
    if not lines:
        raise ValueError("lines must not be empty: a run without metrics cannot be plotted.")
    figure, (left, right) = _figure(2)
    for name, label in (("train_bpd", "loss"), ("train_mse", "loss (unweighted squared error)")):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            left.plot(*zip(*points, strict=True), label=label, linewidth=1)
            if name == "train_bpd":  # held-out bits/dim are on the same axis
                points += [(line["step"], line["eval_bpd"]) for line in lines if line.get("eval_bpd") is not None]
            later = [y for step, y in points if step >= lines[-1]["step"] / 10] or [points[-1][1]]
            left.set_ylim(0.97 * min(later), 1.1 * max(later))
    alike = _alike_evaluations(lines)
    if alike:
        axes = left if any("train_bpd" in line for line in lines) else left.twinx()
        for i, ((images, draws), group) in enumerate(alike.items()):
            steps, bits = ([line[name] for line in group] for name in ("step", "eval_bpd"))
            errors = [line.get("eval_bpd_stderr") or 0.0 for line in group]
            style: dict[str, Any] = {"fmt": "o-", "markersize": 4} if i == 0 else {"fmt": "*", "markersize": 9}
            label = "held out, bits/dim"
            if len(alike) > 1:
                label += f" ({images} images, {draws} draw{'' if draws == 1 else 's'} each)"
            axes.errorbar(steps, bits, errors, color="C1", label=label, **style)
        if axes is not left:
            axes.legend(frameon=False, loc="center right")
    left.set(xlabel="step")
    left.legend(frameon=False)
    speeds = [(line["step"], line["images_per_second"]) for line in lines if line.get("images_per_second")]
    if speeds:
        right.plot(*zip(*speeds, strict=True), linewidth=1)
        right.set_ylim(0, 1.1 * max(speed for _, speed in speeds))
    right.set(xlabel="step", ylabel="images per second")
    _save(figure, path, title)


def _alike_evaluations(lines: Sequence[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """The lines with held-out bits/dim, by the number of images and of draws for each image."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in lines:
        if line.get("eval_bpd") is not None:
            groups.setdefault((line.get("eval_num_images"), line.get("eval_num_samples")), []).append(line)
    return groups


def plot_loss_by_gamma(
    gamma_t: torch.Tensor,
    mse: torch.Tensor,
    path: str | os.PathLike,
    *,
    terms_bpd: dict[str, float] | None = None,
    title: str = "",
) -> None:
    """Plots the density of the diffusion loss over γ, ½ mse(γ)/ln 2 bits/dim per unit of γ.

    The area under the curve is the diffusion loss. Each point is the mean over an equal number of draws, or over those
    of one level in a chain of few steps, with a band of two standard errors.

    Args:
        gamma_t, mse (`torch.Tensor` of the same shape): noise levels, and the mean squared errors of ε̂ at them.
        path (`str` or `os.PathLike`): file to write.
        terms_bpd (`dict[str, float]`, *optional*): terms of the bound, drawn as a stacked bar beside the curve.
        title (`str`, *optional*): title of the figure.
    """
    order = gamma_t.flatten().argsort()
    gamma, density = gamma_t.flatten()[order], 0.5 * mse.flatten()[order] / math.log(2)
    sizes = _group_sizes(gamma)
    groups = list(zip(gamma.split(sizes), density.split(sizes), strict=True))
    center = torch.stack([g.mean() for g, _ in groups])
    mean = torch.stack([d.mean() for _, d in groups])
    error = torch.stack([d.std(unbiased=False) / math.sqrt(max(1, len(d) - 1)) for _, d in groups])
    figure, axes = _figure(2 if terms_bpd else 1, ratios=(5, 2) if terms_bpd else None)
    left = axes[0]
    left.plot(center, mean, marker=".")
    left.fill_between(center, mean - 2 * error, mean + 2 * error, alpha=0.3, linewidth=0)
    left.set(xlabel="γ = −log SNR  (less noise ← → more)", ylabel="bits/dim per unit of γ", ylim=(0, None))
    if terms_bpd:
        bottom = 0.0
        for name, value in terms_bpd.items():
            axes[1].bar(0, value, bottom=bottom, label=f"{name} {value:.4f}", width=0.5)
            bottom += value
        axes[1].set(xticks=[], ylabel="bits/dim", xlim=(-0.5, 0.5), ylim=(0, 1.35 * bottom))
        axes[1].legend(frameon=False, loc="upper center", reverse=True, fontsize="small", handlelength=1)
    _save(figure, path, title)


def _group_sizes(gamma: torch.Tensor) -> list[int]:
    """How many of some sorted levels go into each point: those of one level if there are few, else equal shares."""
    counts = gamma.unique_consecutive(return_counts=True)[1]
    if len(counts) <= min(_POINTS, len(gamma) // 2):
        return counts.tolist()
    points = min(len(gamma), max(2, min(_POINTS, len(gamma) // 20)))  # none is empty
    return [len(part) for part in gamma.tensor_split(points)]


def plot_bits_histogram(per_image_bpd: torch.Tensor, path: str | os.PathLike, title: str = "") -> None:
    """Plots a histogram of the bits/dim of single images, with their mean."""
    figure, (axes,) = _figure(1)
    axes.hist(per_image_bpd.numpy(), bins=min(60, max(5, len(per_image_bpd) // 8)))
    mean = float(per_image_bpd.mean())
    axes.axvline(mean, color="black", linewidth=1, label=f"mean {mean:.4f}")
    axes.set(xlabel="bits/dim of an image", ylabel="images")
    axes.legend(frameon=False)
    _save(figure, path, title)


def plot_image_rows(rows: Sequence[tuple[str, torch.Tensor, Sequence[str]]], path: str | os.PathLike) -> None:
    """Draws rows of images, each with a title at its left and a caption below every image.

    Args:
        rows (`Sequence[tuple[str, torch.Tensor, Sequence[str]]]`): the title of a row, its images `(K, C, H, W)` with
            values in [0, 1], of which the first channel or the first three are shown, and their K captions.
        path (`str` or `os.PathLike`): image file.
    """
    from matplotlib.figure import Figure

    columns = max(len(images) for _, images, _ in rows)
    figure = Figure(figsize=(0.7 * columns + 1, 0.9 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (title, images, captions) in zip(grid, rows, strict=True):
        for axes in line:
            axes.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(title.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize="small")
        for axes, image, caption in zip(line, images, captions, strict=False):
            pixels = image[:3] if len(image) > 3 else image if len(image) == 3 else image[:1].expand(3, -1, -1)
            axes.imshow(pixels.cpu().float().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xlabel(caption, fontsize="small", labelpad=2)
    _save(figure, path, "")


def plot_code(
    path: str | os.PathLike,
    *,
    gammas: Sequence[float],
    step_bpd: Sequence[float],
    image_bpd: Sequence[float],
    rate_bpd: Sequence[float],
    rmse: Sequence[float],
    pictures: torch.Tensor,
    title: str = "",
) -> None:
    """Plots where the bits of a compressed file go, and what is seen of the images as the bits arrive.

    Args:
        path (`str` or `os.PathLike`): image file.
        gammas (`Sequence[float]`): γ of the T + 1 latents, increasing.
        step_bpd (`Sequence[float]`): bits/dim of each of the T steps.
        image_bpd (`Sequence[float]`): bits/dim of each image.
        rate_bpd, rmse (`Sequence[float]`): bits/dim spent down to a level, and the root mean squared error of x̂ there.
        pictures (`torch.Tensor` of shape `(B, K, C, H, W)`): x̂ of B images at K levels, the last one the image.
        title (`str`, *optional*): of the figure.
    """
    figure, axes = _figure(3)
    upper, left, right = axes
    widths = [b - a for a, b in zip(gammas[:-1], gammas[1:], strict=True)]
    upper.stairs([bits / width for bits, width in zip(step_bpd, widths, strict=True)], gammas, fill=True, alpha=0.6)
    upper.set(xlabel="γ = −log SNR", ylabel="bits/dim per unit of γ", title="bits by noise level")
    left.hist(list(image_bpd), bins=min(40, max(5, len(image_bpd) // 4)), alpha=0.6)
    left.set(xlabel="bits/dim", ylabel="images", title="bits by image")
    right.plot(rate_bpd, rmse, marker=".", markersize=3)
    right.set(xlabel="bits/dim spent", ylabel="RMSE of x̂", title="rate and distortion", ylim=(0, None))
    rows, columns = pictures.shape[:2]
    images = pictures.flatten(0, 1)
    images = images if images.shape[1] in (1, 3) else images[:, :3] if images.shape[1] > 3 else images[:, :1]
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.9 * rows)
    bottom = 0.9 * rows / (height + 0.9 * rows)
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, bottom, 1, 1 - bottom))
    strip = figure.add_axes((0.01, 0.05, 0.98, bottom - 0.06))
    strip.set_in_layout(False)
    strip.imshow(image_grid(images, columns=columns), cmap="gray", interpolation="nearest")
    strip.set(xticks=[], yticks=[], frame_on=False)
    strip.set_xlabel("x̂ as the bits arrive, from left to right; the last column is the image")
    _save(figure, path, title)


def _figure(columns: int, ratios: tuple[int, ...] | None = None):
    # without pyplot, which has global state and may need a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.6), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, width_ratios=ratios)[0]


def _save(figure, path: str | os.PathLike, title: str) -> None:
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=120)
