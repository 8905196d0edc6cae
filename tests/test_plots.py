"""plots.py: the pictures show the data that they are drawn from."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vdm import plots


def columns_of(path, color, left_half=True):
    """The leftmost and the rightmost place of a color, as fractions of half of the picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    half = pixels.shape[1] // 2
    pixels = pixels[:, :half] if left_half else pixels[:, half:]
    found = (np.abs(pixels - np.array(color)).max(-1) < 12).any(0).nonzero()[0]
    return found.min() / half, found.max() / half


@pytest.mark.parametrize("held_out", [5.2, 9.0])
def test_held_out_bits_are_in_the_picture_wherever_they_are(tmp_path, held_out):
    lines = [{"step": 6, "train_bpd": 7.4, "eval_bpd": 5.9, "images_per_second": 111.7},
             {"step": 12, "train_bpd": 5.6, "eval_bpd": held_out, "images_per_second": 110.0}]  # fmt: skip
    plots.plot_training(lines, tmp_path / "training.png")
    loss, bits = (columns_of(tmp_path / "training.png", c) for c in ((31, 119, 180), (255, 127, 14)))
    assert bits[1] >= loss[1] > 0.85  # as far to the right as the loss
    with pytest.raises(ValueError, match="lines must not be empty"):
        plots.plot_training([], tmp_path / "training.png")


def test_a_line_joins_evaluations_of_the_same_images_and_draws_only(tmp_path):
    """The last one of a run has more draws, and would look like a rise after those on the way."""
    lines = [{"step": s, "train_bpd": 2.0, "eval_bpd": 1.9, "eval_num_images": 297, "eval_num_samples": k,
              "images_per_second": 9.0} for s, k in ((10, 1), (60, 1), (100, 32))]  # fmt: skip
    groups = plots._alike_evaluations([*lines, {"step": 99, "train_bpd": 2.0}])
    assert groups == {(297, 1): lines[:2], (297, 32): lines[2:]}

    def share_of_orange(lines):
        plots.plot_training(lines, tmp_path / "training.png")
        pixels = np.asarray(Image.open(tmp_path / "training.png").convert("RGB")).astype(int)
        found = np.abs(pixels - np.array((255, 127, 14))).max(-1) < 12
        return found[found.shape[0] // 2 :, : found.shape[1] // 2].any(0).mean()

    joined = share_of_orange([line | {"eval_num_samples": 1} for line in lines])
    assert share_of_orange(lines) < 0.8 * joined


@pytest.mark.parametrize("draws", [1, 2, 3, 19, 41])
def test_few_draws_make_a_picture_without_a_warning(tmp_path, draws):
    """No share of the draws is empty, and one draw has no error: warnings are errors here."""
    gamma, mse = torch.linspace(-5, 5, draws), torch.full((draws,), 2 * math.log(2))
    plots.plot_loss_by_gamma(gamma, mse, tmp_path / "loss.png", terms_bpd={"diffusion": 1.0})
    plots.plot_bits_histogram(torch.arange(float(draws)), tmp_path / "bits.png")
    for name in ("loss", "bits"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 50


def test_the_loss_of_few_levels_has_a_point_for_each():
    levels = torch.tensor([-7.0, -3.0, 0.5]).repeat_interleave(20)
    assert plots._group_sizes(levels) == [20, 20, 20]
    assert plots._group_sizes(torch.cat([levels, torch.full((5,), 2.0)])) == [20, 20, 20, 5]


@pytest.mark.parametrize(("draws", "points"), [(1, 1), (2, 2), (39, 2), (300, 15), (5000, 40)])
def test_the_loss_of_draws_has_points_of_equal_shares(draws, points):
    sizes = plots._group_sizes(torch.linspace(-5, 5, draws))
    assert sum(sizes) == draws and len(sizes) == points and max(sizes) - min(sizes) <= 1
