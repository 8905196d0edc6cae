"""editing.py: images as starts, inpainting against exact conditionals, latents by the ODE and back."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from torch import nn

from diffusers_vdm import FixedLinearGamma, LinearBetaScheduler, VDMPipeline, VDMScheduler, diffusion
from diffusers_vdm.editing import great_circle, image_levels, repainted_values
from tests.models import curved_gamma, pipeline, quiet_unet, sample
from tests.tensors import F64, f64, normal, random_levels, seeded

pytestmark = [  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
]

# ---- images of any kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [17, 256])
def test_every_kind_of_image_gives_the_levels_that_the_pipeline_made(num_levels):
    pipe = pipeline(VDMScheduler(), num_levels=num_levels)
    levels = random_levels(3, 3, 8, 8, num_levels=num_levels).long()
    kinds = [pipe._of_type(levels, kind) for kind in ("pil", "np", "pt")]
    kinds += [list(kinds[2]), [*kinds[0][:2], kinds[1][2]]]
    for kind in kinds:
        assert torch.equal(image_levels("image", kind, (3, 8, 8), num_levels), levels)
    one = image_levels("image", kinds[0][0], (3, 8, 8), num_levels)
    assert torch.equal(one, levels[:1])
    as_bytes = (255 * kinds[2]).round().to(torch.uint8)
    assert torch.equal(image_levels("image", as_bytes, (3, 8, 8), num_levels), levels)
    gray = pipeline(VDMScheduler(), num_levels=num_levels, channels=1)
    assert torch.equal(
        image_levels("image", gray._of_type(levels[:, :1], "pil"), (1, 8, 8), num_levels), levels[:, :1]
    )


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("x.png", TypeError, "image must be PIL images, arrays or tensors, got a str"),
        (torch.zeros(3, 8, 9), ValueError, r"image must have the 3 channels and the size \(8, 8\)"),
        (torch.zeros(1, 8, 8), ValueError, "image must have the 3 channels"),
        (torch.full((3, 8, 8), 1.5), ValueError, r"image must have values in \[0, 1\]"),
        (torch.full((3, 8, 8), math.nan), ValueError, r"image must have values in \[0, 1\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "image must have float or uint8 values"),
        (torch.zeros(8), ValueError, "image must have 2 to 4 dimensions"),
        (torch.zeros(8, 8), ValueError, "image must have the 3 channels"),
        (Image.new("F", (8, 8)), ValueError, "image must be a PIL image of 8 bits per channel, got the mode F"),
        (Image.new("I;16", (8, 8)), ValueError, "got the mode I;16"),
        ([], ValueError, "image must not be an empty list"),
        (np.zeros((8, 8, 4), np.float32), ValueError, "image must have the 3 channels"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], ValueError, "image must be images of one size"),
    ],
)
def test_other_images_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        image_levels("image", image, (3, 8, 8), 256)


def test_mask_is_white_where_it_repaints():
    mask = Image.new("L", (8, 6), 0)
    mask.putpixel((3, 2), 255)
    mask.putpixel((0, 0), 100)
    expected = torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    expected[0, 0, 2, 3] = True
    for kind in (mask, mask.convert("RGB"), np.asarray(mask)[..., None] / 255, torch.tensor(np.asarray(mask))[None]):
        assert torch.equal(repainted_values(kind, (3, 6, 8)), expected)
    array = np.asarray(mask) > 127
    for kind in (array, array.astype(np.uint8), torch.tensor(array), [array.astype(np.int64)], array.astype(float)):
        assert torch.equal(repainted_values(kind, (3, 6, 8)), expected)
    with pytest.raises(ValueError, match=r"mask_image must have one channel and the size \(6, 8\)"):
        repainted_values(Image.new("L", (8, 8)), (3, 6, 8))


# ---- a start in the middle ------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> VDMPipeline:
    return pipeline(VDMScheduler.from_noise_schedule(curved_gamma()))


SAMPLERS = ["ancestral", "ddim", "dpmsolver++", "linear beta", "Euler", "DDIM"]


def set_sampler(pipe: VDMPipeline, name: str) -> None:
    if name in ("Euler", "DDIM"):
        pipe.scheduler = pipe.scheduler.to_diffusers(EulerDiscreteScheduler if name == "Euler" else DDIMScheduler)
    elif name == "linear beta":
        pipe.scheduler = LinearBetaScheduler(timestep_spacing="trailing")
    else:
        pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, algorithm=name)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_less_strength_stays_nearer_to_the_image(pipe, sampler):
    set_sampler(pipe, sampler)
    image = random_levels(1, 3, 8, 8).float() / 255
    seen, distances = [], []
    for strength in (0.1, 0.5, 1.0):
        options = {"num_inference_steps": 10, "image": image, "strength": strength, "output_type": "pt"}
        counted = []
        found = pipe(
            **options,
            batch_size=8,
            generator=seeded(0),
            callback_on_step_end=lambda p, i, t, x, c=counted: c.append(t),
        ).images
        seen.append(len(counted))
        distances.append(float((found - image).square().mean().sqrt()))
        assert pipe.num_timesteps == len(counted)
    assert seen == [1, 5, 10]
    assert distances[0] < distances[1] < distances[2]
    assert distances[0] < 0.2


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, KDPM2AncestralDiscreteScheduler])
@pytest.mark.parametrize("strength", [0.2, 0.3, 0.5, 0.6])
def test_steps_of_two_calls_are_never_cut(pipe, scheduler, strength):
    """All samplers end near each other, from the same start."""
    image = random_levels(1, 3, 8, 8).float() / 255
    options = {"num_inference_steps": 20, "image": image, "strength": strength, "output_type": "pt"}
    expected = pipe(**options, generator=seeded(0)).images
    pipe.scheduler = pipe.scheduler.to_diffusers(scheduler)
    counted: list[int] = []
    options["callback_on_step_end"] = lambda pipe, i, t, tensors: counted.append(i)
    found = pipe(**options, generator=seeded(0)).images
    assert len(counted) % 2 == 1  # the last step is a single call
    assert float((found - expected).abs().mean()) < 0.15


def test_a_sampler_that_cannot_start_in_the_middle_is_refused(pipe):
    pipe.scheduler = pipe.scheduler.to_diffusers(PNDMScheduler)
    with pytest.raises(ValueError, match="strength must be 1 for a PNDMScheduler"):
        pipe(image=IMAGE, strength=0.5, num_inference_steps=4)
    mask = torch.zeros(1, 8, 8)
    found = pipe(image=IMAGE, mask_image=mask, num_inference_steps=4, output_type="pt").images
    assert torch.equal(found[0], IMAGE)


def test_number_of_images_follows_the_images_and_masks():
    pipe = pipeline(VDMScheduler.from_noise_schedule(curved_gamma()), num_class_embeds=4)
    two, masks = IMAGE.expand(2, 3, 8, 8), torch.ones(3, 1, 8, 8)
    assert sample(pipe, image=two, class_labels=3).shape[0] == 2
    assert sample(pipe, image=IMAGE, mask_image=masks, class_labels=np.int64(1)).shape[0] == 3
    assert sample(pipe, image=two, class_labels=[1, 2], strength=np.float32(0.5)).shape[0] == 2


def test_start_has_the_noise_of_its_step(pipe):
    """z_t of the first step done is α_t x + σ_t ε, with the noise that the same generator gives."""
    image, steps = random_levels(2, 3, 8, 8), []

    class Spy(nn.Module):
        config, dtype, device, keeps_float32_inputs = pipe.unet.config, torch.float32, torch.device("cpu"), True

        def forward(self, z_t, timestep, return_dict=True, **more):
            steps.append((z_t, timestep))
            return (torch.zeros_like(z_t),)

    pipe.unet = Spy()
    pipe(num_inference_steps=4, image=image.float() / 255, strength=0.5, generator=seeded(3))
    z_t, timestep = steps[0]
    gamma_t = pipe.scheduler.noise_schedule().gamma_of_timestep(timestep)
    noise = torch.randn(2, 3, 8, 8, generator=seeded(3))
    torch.testing.assert_close(z_t, diffusion.q_sample(diffusion.x_from_levels(image, 256), noise, gamma_t))
    assert len(steps) == 2 and timestep == pipe.scheduler.timesteps[2]


# ---- inpainting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_levels", [17, 256])
def test_known_pixels_are_kept_exactly(pipe, sampler, num_levels):
    set_sampler(pipe, sampler)
    pipe.register_to_config(num_levels=num_levels)
    levels = random_levels(2, 3, 8, 8, num_levels=num_levels)
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:5, 3:7] = 1
    image = levels.float() / (num_levels - 1)
    found = pipe(num_inference_steps=5, image=image, mask_image=mask, output_type="pt", generator=seeded(0)).images
    new = mask.bool().expand(2, 3, 8, 8)
    assert torch.equal(found[~new], image[~new])
    assert float((found[new] - image[new]).abs().mean()) > 0.05
    as_pil = pipe(num_inference_steps=5, image=image, mask_image=mask, generator=seeded(0)).images
    assert torch.equal(image_levels("image", as_pil, (3, 8, 8), num_levels)[~new], levels.long()[~new])


class CorrelatedGaussian(nn.Module):
    """E[ε | z_t] for images of two pixels in a row with means MEAN and covariance COVARIANCE; exact, in float64."""

    dtype, device, keeps_float32_inputs = F64, torch.device("cpu"), True
    config = FrozenDict(in_channels=1, sample_size=(1, 2), num_class_embeds=None)
    mean, covariance = f64([0.1, -0.2]), f64([[0.04, 0.03], [0.03, 0.05]])

    def forward(self, z_t, timestep, return_dict=True, **more):
        gamma_t = FixedLinearGamma(-13.3, 6.0).gamma_of_timestep(timestep)
        a, s = diffusion.alpha(gamma_t), diffusion.sigma(gamma_t)
        of_z = a**2 * self.covariance + s**2 * torch.eye(2, dtype=F64)
        eps_hat = s * torch.linalg.solve(of_z, (z_t.flatten(1) - a * self.mean).T).T
        return (eps_hat.view_as(z_t),)


@pytest.mark.parametrize(("num_resamples", "bias", "of_std"), [(1, 0.17, 0.1), (10, 0.015, 0.08)])
def test_inpainting_a_gaussian_against_its_conditional(num_resamples, bias, of_std):
    """p(x_2 | x_1) is normal. Its mean is shifted by 0.3; replacement alone shifts by half of that."""
    net = CorrelatedGaussian()
    known, n = 0.5, 3000
    scheduler = VDMScheduler.from_noise_schedule(FixedLinearGamma(-13.3, 6.0))
    pipe = InpaintedPipeline(net, scheduler)
    level = round((known + 1) * 128 - 0.5)
    x_1 = 2 * (level + 0.5) / 256 - 1
    image, mask = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 1.0]]])
    image[..., 0] = level / 255
    z_0 = pipe(
        batch_size=n, num_inference_steps=50, image=image, mask_image=mask, num_resamples=num_resamples,
        output_type="latent", generator=seeded(0),
    ).images  # fmt: skip
    x_2 = z_0[:, 0, 0, 1]
    gain = net.covariance[0, 1] / net.covariance[0, 0]
    mean = float(net.mean[1] + gain * (x_1 - net.mean[0]))
    std = float((net.covariance[1, 1] - gain * net.covariance[0, 1]).sqrt())
    noise = 4 * std / math.sqrt(n)
    assert abs(float(x_2.mean()) - mean) < bias + noise
    assert abs(float(x_2.std()) / std - 1) < of_std
    assert abs(mean - float(net.mean[1])) > 0.25  # what is at stake


class InpaintedPipeline(VDMPipeline):
    """A pipeline around a network that is no model of diffusers."""

    _execution_device = torch.device("cpu")
    text_encoder = tokenizer = None

    def __init__(self, unet, scheduler):
        self._internal_dict = FrozenDict(num_levels=256)
        self._net, self.scheduler = unet, scheduler
        self.set_progress_bar_config(disable=True)

    unet = property(lambda self: self._net)

    def maybe_free_model_hooks(self):
        pass


def test_noisier_latents_have_the_moments_of_the_forward_process():
    gamma_s, gamma_t = f64(-3.0), f64(0.5)
    x = f64([0.7])
    noise_s, noise_t = normal(100_000), normal(100_000, seed=1)
    z_s = diffusion.q_sample(x, noise_s, gamma_s)
    z_t = diffusion.forward_step(z_s, noise_t, gamma_s, gamma_t)
    assert float(z_t.mean()) == pytest.approx(float(diffusion.alpha(gamma_t) * 0.7), abs=0.01)
    assert float(z_t.std()) == pytest.approx(float(diffusion.sigma(gamma_t)), rel=0.01)
    exact = diffusion.forward_step(z_s, torch.zeros_like(z_s), gamma_s, gamma_t)
    torch.testing.assert_close(exact, z_s * diffusion.alpha(gamma_t) / diffusion.alpha(gamma_s))


# ---- latents by the ODE -------------------------------------------------------------------------------------------


@pytest.fixture
def smooth_pipe() -> VDMPipeline:
    pipe = VDMPipeline(quiet_unet(), VDMScheduler.from_noise_schedule(FixedLinearGamma(-10.0, 5.0)), None, 17)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_images_are_encoded_and_decoded_without_loss(smooth_pipe):
    images = random_levels(3, 1, 8, 8, num_levels=17).float() / 16
    latents = smooth_pipe.encode(images)
    assert latents.shape == (3, 1, 8, 8)
    again = smooth_pipe.decode(latents, output_type="pt")
    assert torch.equal(again, images)
    # the latents themselves come back within the tolerance, and more exactly with a smaller one
    errors = []
    exact = smooth_pipe.encode(images, tolerance=1e-7, generator=seeded(1))
    for tolerance in (1e-3, 1e-5):
        z_1 = smooth_pipe.encode(images, tolerance=tolerance, generator=seeded(1))
        errors.append(float((z_1 - exact).abs().max()))
    assert errors[1] < errors[0] < 0.05 and errors[1] < 1e-3


def test_interpolation_starts_and_ends_with_the_images(smooth_pipe):
    images = random_levels(2, 1, 8, 8, num_levels=17).float() / 16
    found = smooth_pipe.interpolate(images, 5, output_type="pt")
    assert found.shape == (5, 1, 8, 8)
    assert torch.equal(found[0], images[0]) and torch.equal(found[-1], images[1])
    assert len(smooth_pipe.interpolate(list(images), 2)) == 2
    for wrong, number in ((images[:1], 5), (images, 1)):
        with pytest.raises(ValueError, match="image must be two images, and num_images at least 2"):
            smooth_pipe.interpolate(wrong, number)


def test_great_circle_keeps_the_norm_and_turns_evenly():
    a, b = normal(1, 4, 4), normal(1, 4, 4, seed=1)
    a, b = 4 * a / a.norm(), 4 * b / b.norm()
    path = great_circle(a, b, torch.linspace(0, 1, 7))
    torch.testing.assert_close(path.flatten(1).norm(dim=1), torch.full((7,), 4.0, dtype=F64))
    cosines = (path[1:] * path[:-1]).flatten(1).sum(1) / 16
    torch.testing.assert_close(cosines, cosines[:1].expand(6))
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(great_circle(a, a, torch.tensor([0.3]))[0], a)


def test_classes_are_passed_to_the_ode():
    pipe = pipeline(VDMScheduler.from_noise_schedule(curved_gamma()), num_class_embeds=4)
    images = random_levels(2, 3, 8, 8).float() / 255
    one, other = (pipe.encode(images, label, tolerance=1e-2, generator=seeded(0)) for label in (0, [1, 2]))
    assert float((one - other).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="class_labels must be given"):
        pipe.encode(images)


# ---- what is refused ----------------------------------------------------------------------------------------------

IMAGE, MASK = torch.zeros(3, 8, 8), torch.ones(1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask_image": MASK}, ValueError, "mask_image needs image"),
        ({"strength": 0.5}, ValueError, "strength needs image"),
        ({"num_resamples": 2}, ValueError, "num_resamples needs image"),
        ({"image": IMAGE, "num_resamples": 2}, ValueError, "num_resamples=2 needs mask_image"),
        ({"image": IMAGE, "strength": 0}, ValueError, r"strength must be within \(0, 1\]"),
        ({"image": IMAGE, "strength": math.nan}, ValueError, r"strength must be within \(0, 1\]"),
        ({"image": IMAGE, "strength": "1"}, TypeError, "strength must be a number"),
        ({"image": IMAGE, "mask_image": MASK[:, :4]}, ValueError, "mask_image must have one channel and the size"),
        (
            {"image": IMAGE.expand(2, 3, 8, 8), "batch_size": 3},
            ValueError,
            "image must be one for all or one for each",
        ),
        (
            {"image": IMAGE, "mask_image": MASK.expand(2, 1, 8, 8), "batch_size": 3},
            ValueError,
            "mask_image must be one for all or one for each",
        ),
    ],
)
def test_wrong_edits_are_refused_before_any_step(pipe, arguments, error, message):
    def no_step(*_):
        raise AssertionError("a step was taken")

    with pytest.raises(error, match=message):
        pipe(**{"num_inference_steps": 3, "callback_on_step_end": no_step} | arguments)


def test_resampling_needs_steps_that_can_be_repeated(pipe):
    for name in ("dpmsolver++", "Euler"):
        set_sampler(pipe, "ancestral") if name != "Euler" else None
        set_sampler(pipe, name)
        with pytest.raises(ValueError, match="num_resamples=3 needs the ancestral or ddim sampler"):
            pipe(image=IMAGE, mask_image=MASK, num_resamples=3, num_inference_steps=2)


def test_images_without_edits_are_as_before(pipe):
    assert torch.equal(sample(pipe, batch_size=2), sample(pipe, batch_size=2, image=None, mask_image=None))
