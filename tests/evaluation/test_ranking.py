"""evaluation/ranking.py: areas against counts of pairs and simulations, and scores of models with known densities."""

import math
import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from diffusers_vdm import FixedLinearGamma, VariationalBound, evaluate_mc
from diffusers_vdm.evaluation.monte_carlo import mean_stderr
from diffusers_vdm.evaluation.ranking import (
    auroc,
    bits_minus_png,
    bits_minus_reference,
    png_bits,
    png_file,
    typicality_bits,
)
from tests.oracles import GaussianDenoiser, GaussianMixture, MixtureDenoiser
from tests.tensors import TensorSizes, f64, normal, random_levels, seeded, uniform

SCHEDULE = FixedLinearGamma(-13.0, 6.0)


# ---- the area under the curve ------------------------------------------------------------------------------------


def by_pairs(scores_out, scores_in) -> tuple[float, float]:
    """The area and DeLong's standard error, from the matrix of all pairs."""
    psi = (scores_out[:, None] > scores_in).double() + 0.5 * (scores_out[:, None] == scores_in)
    of_out, of_in = psi.mean(1), psi.mean(0)
    return float(psi.mean()), math.sqrt(float(of_out.var() / len(of_out) + of_in.var() / len(of_in)))


@pytest.mark.parametrize("ties", [False, True])
def test_area_is_the_share_of_pairs_and_the_statistic_of_mann_and_whitney(ties):
    scores_out, scores_in = normal(37, seed=1) + 0.4, normal(23, seed=2)
    if ties:
        scores_out, scores_in = (2 * scores_out).round(), (2 * scores_in).round()
        assert len(torch.cat([scores_out, scores_in]).unique()) < 15
    found = auroc(scores_out, scores_in)
    assert found == pytest.approx(by_pairs(scores_out, scores_in), abs=1e-12)
    statistic = mannwhitneyu(scores_out, scores_in).statistic
    assert found[0] == pytest.approx(statistic / (37 * 23), abs=1e-12)
    labels = np.repeat([1, 0], [37, 23])
    assert found[0] == pytest.approx(roc_auc_score(labels, torch.cat([scores_out, scores_in])), abs=1e-12)


def test_area_depends_on_the_order_of_the_scores_alone():
    scores_out, scores_in = normal(30, seed=1), normal(40, seed=2)
    area, error = auroc(scores_out, scores_in)
    assert auroc((3 * scores_out).exp(), (3 * scores_in).exp()) == (area, error)
    assert auroc(scores_in, scores_out) == pytest.approx((1 - area, error), abs=1e-12)
    assert auroc(-scores_out, -scores_in) == pytest.approx((1 - area, error), abs=1e-12)
    # values that differ by less than float32 can hold are no ties
    assert auroc(f64([1 + 1e-12, 2.0]), f64([1.0, 1.0]))[0] == 1


@pytest.mark.parametrize(
    ("scores_out", "scores_in", "expected"),
    [([3, 4, 5], [0, 1, 2], (1.0, 0.0)), ([0, 1, 2], [3, 4], (0.0, 0.0)), ([1, 1, 1], [1, 1], (0.5, 0.0))],
)
def test_separate_and_equal_scores(scores_out, scores_in, expected):
    assert auroc(f64(scores_out), f64(scores_in)) == expected
    assert auroc(torch.tensor(scores_out), torch.tensor(scores_in)) == expected


def test_standard_error_is_the_spread_of_samples_of_the_populations():
    source = seeded(3)
    areas, errors = [], []
    for _ in range(1500):
        scores_out = torch.randn(40, generator=source).double() + 1.0
        found = auroc(scores_out, 1.5 * torch.randn(60, generator=source).double())
        areas.append(found[0])
        errors.append(found[1])
    exact = 0.5 * (1 + math.erf(1 / math.sqrt(1 + 1.5**2) / math.sqrt(2)))  # P(X > Y) of two normal scores
    spread = np.std(areas, ddof=1)
    assert np.mean(areas) == pytest.approx(exact, abs=4 * spread / math.sqrt(1500))
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.08)


@pytest.mark.parametrize("correlation", [0.9, -0.9])
def test_standard_error_of_pairs_takes_their_correlation_into_account(correlation):
    source = seeded(4)
    areas, errors, unpaired = [], [], []
    for _ in range(1500):
        scores_in = torch.randn(50, generator=source).double()
        own = torch.randn(50, generator=source).double()
        scores_out = 0.5 + correlation * scores_in + math.sqrt(1 - correlation**2) * own
        area, error = auroc(scores_out, scores_in, paired=True)
        areas.append(area)
        errors.append(error)
        alone = auroc(scores_out, scores_in)
        assert alone[0] == area
        unpaired.append(alone[1])
    spread = np.std(areas, ddof=1)
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.08)
    assert (np.mean(unpaired) > 1.5 * spread) == (correlation > 0) and (np.mean(unpaired) < 0.85 * spread) == (
        correlation < 0
    )


def test_memory_grows_as_the_number_of_scores():
    with TensorSizes() as made:
        auroc(normal(3000, seed=1), normal(2000, seed=2))
    assert max(made.sizes) == 5000


def test_the_error_of_one_score_is_not_known():
    area, error = auroc(f64([1.0]), f64([0.0, 2.0]))
    assert area == 0.5 and math.isnan(error)


@pytest.mark.parametrize(
    ("scores_out", "scores_in", "options", "message"),
    [
        ([], [1.0], {}, r"scores_out must have shape \(N,\) with N ≥ 1, got \(0,\)"),
        ([1.0], [[1.0]], {}, r"scores_in must have shape"),
        ([1.0], [1.0, math.nan], {}, "scores_in must not be NaN, got 1"),
        ([1.0], [1.0, 2.0], {"paired": True}, "must be pairs, got 1 and 2 scores"),
    ],
)
def test_wrong_scores_are_refused(scores_out, scores_in, options, message):
    with pytest.raises(ValueError, match=message):
        auroc(f64(scores_out), f64(scores_in), **options)


# ---- bits of files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("num_levels", [17, 256])
def test_png_holds_the_levels_and_its_bits_are_those_of_the_file(channels, mode, num_levels):
    images = random_levels(4, channels, 5, 7, num_levels=num_levels)
    bits = png_bits(images)
    for image, found in zip(images, bits, strict=True):
        content = png_file(image)
        assert found == 8 * len(content) and content.startswith(b"\x89PNG")
        with Image.open(BytesIO(content)) as decoded:
            assert decoded.mode == mode
            pixels = torch.from_numpy(np.array(decoded)).long()
        assert torch.equal(pixels[None] if channels == 1 else pixels.permute(2, 0, 1), image)
    assert torch.equal(png_bits(images.to(torch.uint8)), bits)


def test_png_is_shorter_for_simple_images_and_its_frame_has_57_bytes():
    noise, flat = random_levels(1, 3, 32, 32), torch.full((1, 3, 32, 32), 200)
    assert png_bits(noise) > 8 * noise.numel() and png_bits(flat) < 0.1 * 8 * flat.numel()
    content = png_file(noise[0])
    start = content.index(b"IDAT")
    assert len(content) - struct.unpack(">I", content[start - 4 : start])[0] == 57


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (random_levels(1, 2, 8, 8), ValueError, r"shape \(N, 1 or 3, H, W\), .* got \(1, 2, 8, 8\)"),
        (random_levels(1, 8, 8), ValueError, r"shape \(N, 1 or 3, H, W\)"),
        (normal(1, 1, 8, 8), TypeError, "must be integers, the levels of the pixels, got torch.float64"),
        (256 + random_levels(1, 1, 8, 8), ValueError, r"within \[0, 255\], got 2\d\d to"),
        (-random_levels(1, 1, 8, 8), ValueError, r"within \[0, 255\], got -"),
    ],
)
def test_what_png_cannot_hold_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        png_bits(images)


# ---- scores ------------------------------------------------------------------------------------------------------


def test_scores_are_the_formulas_of_the_papers():
    bits, images = f64([100.0, 300.0]), random_levels(2, 1, 8, 8)
    assert torch.equal(typicality_bits(bits, f64([150.0, 250.0])), f64([100.0, 100.0]))
    assert torch.equal(bits_minus_png(bits, images), bits - png_bits(images))
    assert torch.equal(bits_minus_reference(bits, f64([120.0, 10.0])), f64([-20.0, 290.0]))
    assert bits_minus_png(bits.float(), images).dtype == torch.float64


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: typicality_bits(f64([1.0]), f64([])), r"R ≥ 1, got \(1,\) and \(0,\)"),
        (lambda: typicality_bits(f64([[1.0]]), f64([1.0])), r"R ≥ 1, got \(1, 1\)"),
        (lambda: bits_minus_png(f64([1.0]), random_levels(2, 1, 8, 8)), r"shape \(2,\), one for each image"),
        (lambda: bits_minus_reference(f64([1.0]), f64([1.0, 2.0])), r"of the same images, got \(1,\) and \(2,\)"),
    ],
)
def test_wrong_bits_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()


# ---- models whose density is known --------------------------------------------------------------------------------

MIXTURE = GaussianMixture(f64([0.5, 0.3, 0.2]), 0.4 * normal(3, 16, seed=5), f64([0.01, 0.02, 0.006]))


# draws after which the noise of an image is small beside the differences of images
MANY = {"num_samples": 800, "importance_sampling": True}


def levels_of(x: torch.Tensor) -> torch.Tensor:
    """Real numbers in [−1, 1], `(N, 16)`, as images of 256 levels."""
    return (128 * (x + 1) - 0.5).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 4, 4)


def exact_bits(images: torch.Tensor, mixture: GaussianMixture = MIXTURE) -> torch.Tensor:
    """−log₂ p(x): of the density, times the width of a level in each dimension."""
    x = (images.double().flatten(1) + 0.5) / 128 - 1
    return -(mixture.log_density_nats(x) + 16 * math.log(2 / 256)) / math.log(2)


def measured(images, net=None, **arguments):
    bound = VariationalBound(net or MixtureDenoiser(MIXTURE, SCHEDULE), SCHEDULE)
    return evaluate_mc(bound, images, progress_bar=False, batch_size=2000, **{"num_samples": 200} | arguments)


@pytest.mark.slow
def test_order_and_area_are_those_of_the_exact_density():
    images = levels_of(MIXTURE.sample(100, seeded(1)))
    others = levels_of(MIXTURE.sample(100, seeded(2)) + 0.2 * uniform(100, 1, seed=6) * normal(100, 16, seed=7))
    bits_in, bits_out = (
        16 * measured(each, **MANY, seed=seed).per_image_bpd for seed, each in enumerate((images, others))
    )
    exact_in, exact_out = exact_bits(images), exact_bits(others)
    both = torch.stack([torch.cat([bits_in, bits_out]), torch.cat([exact_in, exact_out])])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95
    expected, error = auroc(exact_out, exact_in)
    assert 0.6 < expected < 0.98 and error < 0.06
    assert auroc(bits_out, bits_in)[0] == pytest.approx(expected, abs=0.03)


@pytest.mark.slow
def test_bits_fail_for_images_that_are_too_simple_and_typicality_does_not():
    """Data with 16 independent values around 0; the other images are nearer to 0 than any of the data."""
    data = GaussianMixture(f64([1.0]), torch.zeros(1, 16, dtype=torch.float64), f64([0.04]))
    net = GaussianDenoiser(SCHEDULE, mean=0.0, variance=0.04)
    everything = [0.2 * normal(100, 16, seed=1), 0.2 * normal(100, 16, seed=2), 0.05 * normal(100, 16, seed=3)]
    images = [levels_of(x) for x in everything]
    found = [16 * measured(each, net, **MANY, seed=seed).per_image_bpd for seed, each in enumerate(images)]
    exact = [exact_bits(each, data) for each in images]
    for bits, held_in, others in (exact, found):
        assert auroc(others, bits)[0] < 0.1
        assert auroc(typicality_bits(others, held_in), typicality_bits(bits, held_in))[0] > 0.85


def test_difference_to_a_reference_is_the_ratio_of_the_densities_and_shares_its_noise():
    wide = GaussianMixture(MIXTURE.weights, MIXTURE.means, 1.5 * MIXTURE.variances)
    images = levels_of(MIXTURE.sample(60, seeded(3)))
    one, two = measured(images), measured(images, MixtureDenoiser(wide, SCHEDULE))
    found = bits_minus_reference(16 * one.per_image_bpd, 16 * two.per_image_bpd)
    exact = bits_minus_reference(exact_bits(images), exact_bits(images, wide))
    shared = 16 * mean_stderr(one.draws_bpd - two.draws_bpd)
    assert float(((found - exact) / shared).abs().max()) < 4.5 and float(exact.std()) > 1
    # other draws for the reference: the errors add
    apart = measured(images, MixtureDenoiser(wide, SCHEDULE), seed=1)
    separate = 16 * mean_stderr(one.draws_bpd - apart.draws_bpd)
    both = 16 * (one.per_image_stderr_bpd.square() + two.per_image_stderr_bpd.square()).sqrt()
    assert float(separate.mean()) == pytest.approx(float(both.mean()), rel=0.1)
    assert float(shared.mean()) < 0.4 * float(separate.mean())


def test_two_models_see_the_same_times_and_noise():
    class Seen(GaussianDenoiser):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            self.draws = [*getattr(self, "draws", []), (timestep.clone(), sample.clone())]
            return super().forward(sample, timestep, class_labels, return_dict)

    images = levels_of(MIXTURE.sample(5, seeded(1)))
    nets = [Seen(SCHEDULE, variance=variance) for variance in (0.1, 0.3)]
    for net in nets:
        measured(images, net, num_samples=3)
    for one, two in zip(nets[0].draws, nets[1].draws, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_standard_error_of_an_image_is_the_spread_of_its_estimates():
    images = levels_of(MIXTURE.sample(40, seeded(4)))
    runs = [measured(images, num_samples=16, seed=seed) for seed in range(40)]
    spread = torch.stack([run.per_image_bpd for run in runs]).var(0).mean().sqrt()
    claimed = torch.stack([run.per_image_stderr_bpd for run in runs]).square().mean().sqrt()
    assert float(claimed) == pytest.approx(float(spread), rel=0.07)
    torch.testing.assert_close(runs[0].draws_bpd.mean(0), runs[0].per_image_bpd)
    assert bool(measured(images, num_samples=1).per_image_stderr_bpd.isnan().all())
