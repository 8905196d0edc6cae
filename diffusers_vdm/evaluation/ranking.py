"""What a likelihood says about single images: scores that are high for unusual ones, and how well they separate them.

The bits of an image, −log₂ p(x), are not a good score by themselves: an image of another kind gets fewer bits than
those the model was trained on if it is simpler [Nalisnick et al. 2019a]. Three corrections are known: the distance to
the typical bits, the bits of a lossless file of the image, and those of another model. [`auroc`] compares all of them.

Every score is oriented the same way: the higher, the less an image looks like the data of the model. All bits are of
one image, as is everything that is derived from them, unless the bits that are passed are bits/dim.

Papers: Nalisnick et al. 2019a, "Do Deep Generative Models Know What They Don't Know?" (arXiv 1810.09136); Nalisnick et
al. 2019b, "Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality" (arXiv 1906.02994); Serrà
et al. 2020, "Input Complexity and Out-of-Distribution Detection with Likelihood-Based Generative Models" (arXiv
1909.11480); Ren et al. 2019, "Likelihood Ratios for Out-of-Distribution Detection" (arXiv 1906.02845); DeLong et al.
1988, "Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves: A Nonparametric
Approach" (Biometrics 44:837–845); Obuchowski 1997, "Nonparametric Analysis of Clustered ROC Curve Data" (Biometrics
53:567–578).
"""

from __future__ import annotations

import math
from io import BytesIO

import torch
from PIL import Image

_CHANNELS = (1, 3)  # grayscale and RGB


def auroc(scores_out: torch.Tensor, scores_in: torch.Tensor, *, paired: bool = False) -> tuple[float, float]:
    """The probability that an out-of-distribution image has a higher score than an in-distribution one.

    With M scores X_i of out-of-distribution images and N scores Y_j of the others, the area under the ROC curve is the
    statistic of Mann and Whitney, A = 1/(MN) Σ_ij ψ(X_i, Y_j), where ψ is 1 for X_i > Y_j, ½ for a tie and else 0. It
    is computed from ranks. Its standard error is that of DeLong et al. 1988, for the populations of both kinds of
    images: with the structural components V_i = 1/N Σ_j ψ(X_i, Y_j) and W_j = 1/M Σ_i ψ(X_i, Y_j),

        stderr² = var(V)/M + var(W)/N,

    and 2 cov(V, W)/N more if X_i and Y_i belong together [Obuchowski 1997, clusters of two]. It estimates 0 for scores
    that are perfectly separated, which says only that this sample is too small to measure the error.

    Args:
        scores_out, scores_in (`torch.Tensor` of shape `(M,)` and `(N,)`): scores, higher for out-of-distribution.
        paired (`bool`, defaults to `False`): X_i is of a changed copy of the image of Y_i, so M = N. This changes the
            standard error alone.

    Returns: `(A, stderr)`; the standard error is NaN for a single score of a kind.
    Raises: `ValueError` for no scores, for NaN, and for pairs of different numbers of scores.
    """
    for name, scores in (("scores_out", scores_out), ("scores_in", scores_in)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} must have shape (N,) with N ≥ 1, got {tuple(scores.shape)}; pass one per image.")
        if bool(scores.isnan().any()):
            raise ValueError(
                f"{name} must not be NaN, got {int(scores.isnan().sum())} of them; leave these images out."
            )
    m, n = len(scores_out), len(scores_in)
    if paired and m != n:
        raise ValueError(f"scores_out and scores_in must be pairs, got {m} and {n} scores; pass paired=False.")
    x, y = scores_out.double(), scores_in.double()
    ranks = _midranks(torch.cat([x, y]))
    # of the scores of the other kind, how many are lower; half of those that are equal
    v = (ranks[:m] - _midranks(x)) / n
    w = 1 - (ranks[m:] - _midranks(y)) / m
    area = float(v.mean())
    if min(m, n) < 2:
        return area, math.nan
    variance = float(v.var()) / m + float(w.var()) / n
    if paired:
        variance += 2 * float(((v - v.mean()) * (w - w.mean())).sum()) / (n - 1) / n
    return area, math.sqrt(max(0.0, variance))


def _midranks(values: torch.Tensor) -> torch.Tensor:
    """The rank of each value from 1 on, float64; equal values have the mean of their ranks."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - 0.5 * (counts - 1))[which]


def typicality_bits(bits: torch.Tensor, reference_bits: torch.Tensor) -> torch.Tensor:
    """|−log₂ p(x) − Ĥ| for single images, where Ĥ is the mean of −log₂ p over reference images
    [Nalisnick et al. 2019b, for a batch of one image].

    Unlike −log₂ p(x) it is also high for images with too few bits.

    Args:
        bits (`torch.Tensor` of shape `(N,)`): −log₂ p(x) of the images, per image or per dimension.
        reference_bits (`torch.Tensor` of shape `(R,)`): the same of in-distribution images, in the same unit. They
            must not be among those that are scored, which would pull the mean toward themselves. If the model was
            trained on them, their mean is too low by as much as the model overfits.

    Returns: `torch.Tensor` of shape `(N,)`, in the unit of the arguments.
    Raises: `ValueError` for no reference images.
    """
    if bits.ndim != 1 or reference_bits.ndim != 1 or len(reference_bits) == 0:
        raise ValueError(
            f"bits and reference_bits must have shapes (N,) and (R,) with R ≥ 1, got {tuple(bits.shape)} and "
            f"{tuple(reference_bits.shape)}."
        )
    return (bits.double() - reference_bits.double().mean()).abs()


def png_bits(images: torch.Tensor) -> torch.Tensor:
    """Bits of each image as a PNG file: 8 times its bytes, as written by Pillow with `optimize=True`.

    The file holds the levels as they are, also if there are fewer than 256: 17 levels are the gray values 0 to 16.
    They are not stretched to 0 … 255, so nothing is added or lost. The parts of a file around its data, 57 bytes, are
    the same for all images of a size and move no rank. Other versions of Pillow and of its zlib may write files that
    differ by some bytes.

    Args:
        images (integer `torch.Tensor` of shape `(N, 1 or 3, H, W)`): levels in [0, 255]; 1 channel is written as
            grayscale, 3 as RGB.

    Returns: `torch.Tensor` of shape `(N,)`, float64.
    Raises: `TypeError` unless the images are integers, and `ValueError` for other shapes and values.
    """
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise TypeError(f"images must be integers, the levels of the pixels, got {images.dtype}.")
    if images.ndim != 4 or images.shape[1] not in _CHANNELS:
        raise ValueError(
            f"images must have shape (N, 1 or 3, H, W), grayscale or RGB as in a PNG file, got {tuple(images.shape)}."
        )
    if images.numel() and (int(images.min()) < 0 or int(images.max()) > 255):
        raise ValueError(f"images must be within [0, 255], got {int(images.min())} to {int(images.max())}.")
    return torch.tensor([8.0 * len(png_file(image)) for image in images], dtype=torch.float64)


def png_file(image: torch.Tensor) -> bytes:
    """The optimized PNG file of the levels of an image, integers of shape `(1 or 3, H, W)` in [0, 255]."""
    pixels = image.to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy()
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


def bits_minus_png(bits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """S(x) = −log₂ p(x) − L(x), where L(x) is the bits of a lossless file of the image [Serrà et al. 2020].

    A simple image needs few bits for any model; what counts is how many more than for a general-purpose compressor.
    The paper takes the smallest of several formats, here it is [`png_bits`] alone.

    Args:
        bits (`torch.Tensor` of shape `(N,)`): −log₂ p(x), bits per image (not bits/dim).
        images (integer `torch.Tensor` of shape `(N, 1 or 3, H, W)`): levels, as for [`png_bits`].

    Returns: `torch.Tensor` of shape `(N,)`, bits per image.
    Raises: `ValueError` if there are not as many bits as images.
    """
    if bits.shape != images.shape[:1]:
        raise ValueError(f"bits must have shape ({len(images)},), one for each image, got {tuple(bits.shape)}.")
    return bits.double() - png_bits(images)


def bits_minus_reference(bits: torch.Tensor, reference_bits: torch.Tensor) -> torch.Tensor:
    """−log₂ p(x) + log₂ p₀(x), minus the log-likelihood ratio to a reference model p₀ [Ren et al. 2019].

    What both models explain, such as a smooth background, cancels. In the paper p₀ is trained on noisy images so that
    it learns the background alone; here it may be any model of the same images, such as a smaller one. Take both
    results from [`evaluate_mc`] with the same seed: image i then has the same (t, ε, ε_0) in both, and the noise of
    the difference is smaller than that of each.

    Args:
        bits, reference_bits (`torch.Tensor` of shape `(N,)`): −log₂ p(x) and −log₂ p₀(x) of the same images, both per
            image or both per dimension.

    Returns: `torch.Tensor` of shape `(N,)`, in the unit of the arguments.
    Raises: `ValueError` for different shapes.
    """
    if bits.shape != reference_bits.shape:
        raise ValueError(
            f"bits and reference_bits must be of the same images, got {tuple(bits.shape)} and "
            f"{tuple(reference_bits.shape)}."
        )
    return bits.double() - reference_bits.double()
