"""Conditions by vectors and images: likelihoods against closed forms, the layers of the networks, and bad input."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from torch import nn

from diffusers_vdm import (
    FixedLinearGamma,
    VariationalBound,
    VDMMultiscale2DModel,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
    calibrate,
    diffusion,
    evaluate_mc,
    evaluate_ode,
    evaluate_vlb,
    ode,
)
from diffusers_vdm.conditions import check_conditions, null_conditions, rows_of_conditions, withheld
from diffusers_vdm.guidance import GuidedNetwork
from tests.models import fixed_weights, network, tiny_preset
from tests.oracles import gamma_of_timestep
from tests.tensors import F64, normal, seeded

SCHEDULE = FixedLinearGamma(-12.0, 6.0)
# x = W c + noise of this variance, c ~ N(0, I) in two dimensions, x in 16
VARIANCE = 0.01
WEIGHTS = 0.12 * normal(16, 2, seed=3)


class LinearGaussian(nn.Module):
    """E[ε | z_t, c] for x | c ~ N(W c, v I); without c, or for a c of NaN, for x ~ N(0, W Wᵀ + v I).

    c is a vector, or an image of one pixel for each of its numbers.
    """

    dtype = F64

    def __init__(self, name: str = "cond_vectors", null: bool = True):
        super().__init__()
        size = {"cond_vectors": {"cond_dim": 2, "null_vectors": null},
                "cond_images": {"cond_channels": 2, "null_images": null}}[name]  # fmt: skip
        self.config, self.name, self.rows = FrozenDict(size | {"sample_size": 4, "in_channels": 1}), name, 0

    def forward(self, z_t, timesteps, return_dict=True, **conditions):
        assert set(conditions) <= {self.name}
        self.rows += len(z_t)
        gamma_t = gamma_of_timestep(SCHEDULE, timesteps).expand(len(z_t))
        c = conditions.get(self.name)
        c = torch.full((len(z_t), 2), math.nan, dtype=F64) if c is None else c.double().reshape(len(z_t), 2)
        unknown = c.isnan().any(1)
        eps_hat = torch.zeros(len(z_t), 16, dtype=F64)
        for own, covariance in ((~unknown, torch.zeros(16, 16, dtype=F64)), (unknown, WEIGHTS @ WEIGHTS.T)):
            if bool(own.any()):
                mean = torch.where(own[:, None], c.nan_to_num(), 0.0)[own] @ WEIGHTS.T * (not unknown[own].any())
                eps_hat[own] = _eps_hat(z_t.double().flatten(1)[own], gamma_t[own], mean, covariance)
        return (eps_hat.view_as(z_t).to(z_t.dtype),)


def _eps_hat(z, gamma_t, mean, covariance):
    """σ (α² Σ + σ² I)⁻¹ (z − α m) for x ~ N(m, Σ), Σ = covariance + v I."""
    a2, s2 = torch.sigmoid(-gamma_t)[:, None, None], torch.sigmoid(gamma_t)[:, None, None]
    whole = a2 * (covariance + VARIANCE * torch.eye(16, dtype=F64)) + s2 * torch.eye(16, dtype=F64)
    residual = z - a2[:, :, 0].sqrt() * mean
    return s2[:, :, 0].sqrt() * torch.linalg.solve(whole, residual[..., None])[..., 0]


def data(num: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 256 levels, and their vectors."""
    c = normal(num, 2, seed=1)
    x = c @ WEIGHTS.T + VARIANCE**0.5 * normal(num, 16, seed=2)
    return (128 * (x + 1) - 0.5).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 4, 4), c


def exact_bpd(images, c) -> tuple[torch.Tensor, torch.Tensor]:
    """−log₂ p(x | c)/16 and −log₂ p(x)/16 of each image: of the density, times the width of a level."""
    x = (images.double().flatten(1) + 0.5) / 128 - 1
    eye, offset = torch.eye(16, dtype=F64), 16 * math.log(2 / 256)
    of_c = torch.distributions.MultivariateNormal(torch.zeros(16, dtype=F64), VARIANCE * eye)
    of_all = torch.distributions.MultivariateNormal(torch.zeros(16, dtype=F64), VARIANCE * eye + WEIGHTS @ WEIGHTS.T)
    logs = of_c.log_prob(x - c @ WEIGHTS.T), of_all.log_prob(x)
    return tuple(-(log + offset) / (16 * math.log(2)) for log in logs)


def as_condition(name: str, c: torch.Tensor) -> dict:
    return {name: c if name == "cond_vectors" else c[:, :, None, None]}


def measured(method, net, images, **conditions):
    if method == "mc":
        bound = VariationalBound(net, SCHEDULE)
        return evaluate_mc(bound, images, num_samples=40, progress_bar=False, **conditions)
    if method == "vlb":
        scheduler = VDMScheduler.from_noise_schedule(SCHEDULE)
        return evaluate_vlb(net, scheduler, images, num_steps=400, progress_bar=False, **conditions)
    tolerances = {"rtol": 1e-4, "atol": 1e-4, "progress_bar": False}
    return evaluate_ode(net, SCHEDULE, images, divergence="exact", **tolerances, **conditions)


@pytest.mark.parametrize("name", ["cond_vectors", "cond_images"])
@pytest.mark.parametrize("method", ["mc", "vlb", "ode"])
def test_a_conditional_likelihood_is_that_of_the_closed_form(method, name):
    images, c = data(40 if method == "ode" else 150)
    of_c, of_all = (float(bits.mean()) for bits in exact_bpd(images, c))
    given = measured(method, LinearGaussian(name), images, **as_condition(name, c)).bpd
    null = measured(method, LinearGaussian(name), images).bpd
    # above by what steps and dequantization cost, which is the same for both
    assert -0.02 < given - of_c < 0.15
    assert null - given == pytest.approx(of_all - of_c, abs=0.02)
    assert of_all - of_c > 0.1


def test_the_difference_of_bounds_is_the_mutual_information():
    images, c = data(400)
    net = LinearGaussian()
    draws = {"num_samples": 10, "progress_bar": False}
    given = evaluate_mc(VariationalBound(net, SCHEDULE), images, cond_vectors=c, **draws).per_image_bpd
    null = evaluate_mc(VariationalBound(net, SCHEDULE), images, **draws).per_image_bpd
    bits = 16 * (null - given)
    expected = 0.5 * float(torch.logdet(torch.eye(2, dtype=F64) + WEIGHTS.T @ WEIGHTS / VARIANCE)) / math.log(2)
    assert float(bits.mean()) == pytest.approx(expected, abs=4 * float(bits.std()) / 20 + 0.02)


def test_rows_of_an_ode_keep_their_conditions():
    images, c = data(24)
    z = normal(24, 1, 4, 4, seed=8)
    together = ode.sample(LinearGaussian(), SCHEDULE, z, rtol=1e-6, atol=1e-6, cond_vectors=c).z
    alone = [ode.sample(LinearGaussian(), SCHEDULE, z[i : i + 1], rtol=1e-6, atol=1e-6, cond_vectors=c[i : i + 1]).z
             for i in (0, 7, 23)]  # fmt: skip
    torch.testing.assert_close(together[[0, 7, 23]], torch.cat(alone), rtol=0, atol=1e-5)
    residual = together.flatten(1) / math.sqrt(1 / (1 + math.exp(-12))) - c @ WEIGHTS.T
    assert float(residual.std()) == pytest.approx(VARIANCE**0.5, rel=0.1)


def test_calibration_measures_the_errors_with_the_condition():
    images, c = data(100)
    scheduler = VDMScheduler.from_noise_schedule(SCHEDULE)
    arguments = {"num_gammas": 9, "num_draws": 4, "progress_bar": False}
    table = calibrate(LinearGaussian(), scheduler, images, cond_vectors=c, **arguments)
    expected = torch.sigmoid(-table.gammas) * VARIANCE
    expected = expected / (expected + torch.sigmoid(table.gammas))
    torch.testing.assert_close(table.mse.flatten(), expected, rtol=0.06, atol=1e-3)


@pytest.mark.parametrize("name", ["cond_vectors", "cond_images"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_moves_away_from_the_null_of_every_condition(name, scale):
    z, c = normal(6, 1, 4, 4), normal(6, 2, seed=4)
    given = {"sample": z, "timestep": torch.full((6,), 500.0, dtype=F64), **as_condition(name, c)}
    net = LinearGaussian(name)
    conditional, null = net(z, given["timestep"], **as_condition(name, c))[0], net(z, given["timestep"])[0]
    net.rows = 0
    guided = GuidedNetwork(net, SCHEDULE, scale)(**given)[0]
    assert net.rows == (6 if scale in (0.0, 1.0) else 12)
    expected = {0.0: null, 1.0: conditional}.get(scale)
    if expected is not None:
        assert torch.equal(guided, expected)
    else:
        torch.testing.assert_close(guided, null + scale * (conditional - null))
    assert not torch.equal(conditional, null)


def test_a_negative_condition_replaces_the_null():
    z, c, other = normal(6, 1, 4, 4), normal(6, 2, seed=4), normal(6, 2, seed=5)
    t, net = torch.full((6,), 300.0, dtype=F64), LinearGaussian(null=False)
    wanted, unwanted = (net(z, t, cond_vectors=each)[0] for each in (c, other))
    guided = GuidedNetwork(net, SCHEDULE, 2.0, negative_conditions={"cond_vectors": other})
    torch.testing.assert_close(guided(z, t, cond_vectors=c)[0], unwanted + 2 * (wanted - unwanted))
    with pytest.raises(ValueError, match=r"negative cond_vectors must have the shape of cond_vectors, \(6, 2\)"):
        GuidedNetwork(net, SCHEDULE, 2.0, negative_conditions={"cond_vectors": other[:5]})(z, t, cond_vectors=c)
    with pytest.raises(ValueError, match="needs a network with the null of a condition; this one has none of cond_v"):
        GuidedNetwork(net, SCHEDULE, 2.0)(z, t, cond_vectors=c)
    with pytest.raises(ValueError, match="needs a condition to guide towards"):
        GuidedNetwork(net, SCHEDULE, 2.0)(z, t)


# ---- the networks ------------------------------------------------------------------------------------------------

CONDITIONS = {"cond_dim": 3, "null_vectors": True, "cond_channels": 2, "null_images": True}


def conditional(cls, **arguments):
    """A network with random weights everywhere, for images of 8×8."""
    if cls is VDMUNet2DModel:
        return network(**CONDITIONS | arguments).double()
    blocks = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2,
              "attention_head_dim": 8, "num_difference_filters": 4, "predict_levels": False}  # fmt: skip
    with fixed_weights():
        net = cls(**blocks | CONDITIONS | arguments)
    source = seeded(42)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return net.eval().double()


BOTH = pytest.mark.parametrize("cls", [VDMUNet2DModel, VDMMultiscale2DModel])
Z, T = normal(4, 3, 8, 8), torch.tensor([0.0, 200.0, 600.0, 1000.0], dtype=F64)
VECTORS, IMAGES = normal(4, 3, seed=6), normal(4, 2, 8, 8, seed=7)


@BOTH
def test_conditions_change_the_output_and_a_row_of_nan_is_a_missing_condition(cls):
    net = conditional(cls)

    def output(**conditions):
        return net(Z, T, **conditions).sample

    base = output()
    assert not torch.allclose(base, output(cond_vectors=VECTORS), atol=1e-4)
    assert not torch.allclose(base, output(cond_images=IMAGES), atol=1e-4)
    vectors, images = VECTORS.clone(), IMAGES.clone()
    vectors[1, 2], images[2, 1, 3, 3] = math.nan, math.nan
    some = output(cond_vectors=vectors, cond_images=images)
    rest = {"cond_vectors": VECTORS, "cond_images": IMAGES}
    torch.testing.assert_close(some[[0, 3]], output(**rest)[[0, 3]])
    torch.testing.assert_close(some[1], output(cond_images=IMAGES)[1])
    torch.testing.assert_close(some[2], output(cond_vectors=VECTORS)[2])
    assert bool(some.isfinite().all())
    loss = net(Z, T, cond_vectors=vectors, cond_images=images).sample.square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


@BOTH
@torch.no_grad()
def test_vectors_are_standardized_before_any_rounding(cls):
    mean, std = [1e4, -3.0, 0.5], [2.0, 100.0, 0.01]
    plain, scaled = conditional(cls), conditional(cls, cond_mean=mean, cond_std=std)
    raw = VECTORS * torch.tensor(std, dtype=F64) + torch.tensor(mean, dtype=F64)
    expected = plain(Z, T, cond_vectors=VECTORS).sample
    torch.testing.assert_close(scaled(Z, T, cond_vectors=raw).sample, expected, rtol=1e-8, atol=1e-8)
    # float32 numbers of 10,000 have digits enough, those of bfloat16 have none
    half = scaled.to(torch.bfloat16)(Z.float(), T.float(), cond_vectors=raw.float()).sample.double()
    same = plain.to(torch.bfloat16)(Z.float(), T.float(), cond_vectors=VECTORS.float()).sample.double()
    assert float((half - same).abs().max()) < 0.05 * float(expected.abs().max())


@BOTH
def test_smaller_images_are_enlarged_by_repeating_their_pixels(cls):
    net, small = conditional(cls), IMAGES[:, :, :4, :2]
    large = small.repeat_interleave(2, dim=2).repeat_interleave(4, dim=3)
    assert torch.equal(net(Z, T, cond_images=small).sample, net(Z, T, cond_images=large).sample)


@BOTH
def test_networks_with_conditions_are_saved_and_loaded(cls, tmp_path):
    net = conditional(cls, cond_mean=[0.1, 0.2, 1 / 3], cond_std=[1.0, 2.0, 0.3]).float()
    net.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    given = {"cond_vectors": VECTORS.float(), "cond_images": IMAGES.float()}
    assert torch.equal(net(Z.float(), T, **given).sample, again(Z.float(), T, **given).sample)


@BOTH
def test_a_network_without_a_null_never_takes_nan_for_a_vector(cls):
    net = conditional(cls, null_vectors=False, null_images=False)
    vectors, images = VECTORS.clone(), IMAGES.clone()
    vectors[0, 0] = math.nan
    assert bool(net(Z, T, cond_vectors=vectors, cond_images=IMAGES).sample[0].isnan().any())
    images[1] = math.nan
    assert bool(net(Z, T, cond_vectors=VECTORS, cond_images=images).sample[1].isnan().any())


ARGUMENTS = [
    ({"cond_dim": 0}, "cond_dim must be a positive integer"),
    ({"cond_channels": True, "null_images": False}, "cond_channels must be a positive integer"),
    ({"cond_dim": None}, "null_vectors needs cond_dim"),
    ({"cond_channels": None}, "null_images needs cond_channels"),
    ({"cond_mean": [0.0]}, "cond_mean must be cond_dim=3 finite numbers, got 1"),
    ({"cond_std": [1.0, math.nan, 1.0]}, "cond_std must be cond_dim=3 finite numbers"),
    ({"cond_std": [1.0, 0.0, 1.0]}, "cond_std must be positive"),
]


@BOTH
@pytest.mark.parametrize("arguments, message", ARGUMENTS)
def test_wrong_arguments_of_a_network_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        conditional(cls, **arguments)


INPUTS = [
    ({"cond_vectors": VECTORS[:, :2]}, r"cond_vectors must have shape \(4, 3\), got \(4, 2\)"),
    ({"cond_vectors": VECTORS[0]}, r"cond_vectors must have shape \(4, 3\)"),
    ({"cond_images": IMAGES[:3]}, r"cond_images must have shape \(4, 2, h, w\)"),
    ({"cond_images": normal(4, 2, 8, 9)}, "cond_images must be of at most the size of sample"),
]


@BOTH
@pytest.mark.parametrize("given, message", INPUTS)
def test_wrong_conditions_are_refused_by_the_network(cls, given, message):
    with pytest.raises(ValueError, match=message):
        conditional(cls)(Z, T, **given)


@BOTH
@pytest.mark.parametrize("name, given", [("cond_vectors", VECTORS), ("cond_images", IMAGES)])
def test_missing_and_unexpected_conditions_are_refused_by_the_network(cls, name, given):
    other = {"cond_vectors": "cond_images", "cond_images": "cond_vectors"}[name]
    value = {"cond_vectors": VECTORS, "cond_images": IMAGES}[other]
    needs = conditional(cls, null_vectors=False, null_images=False)
    with pytest.raises(ValueError, match=f"{name} must be given to this network"):
        needs(Z, T, **{other: value})
    none = {"cond_dim": None, "null_vectors": False, "cond_channels": None, "null_images": False}
    with pytest.raises(ValueError, match=f"{name} were given to a network without them"):
        conditional(cls, **none)(Z, T, **{name: given})


# ---- checks of whole data sets -----------------------------------------------------------------------------------

BAD = [
    ({}, ValueError, "cond_vectors must be given"),
    ({"cond_vectors": [[0.0, 1.0]]}, TypeError, "cond_vectors must be a floating-point torch.Tensor, got list"),
    ({"cond_vectors": torch.zeros(3, 2).long()}, TypeError, "got torch.int64"),
    ({"cond_vectors": torch.zeros(2, 2)}, ValueError, r"shape \(3, 2\), got \(2, 2\)"),
    ({"cond_vectors": torch.tensor([[0.0, 1.0], [math.nan, 0.0], [0.0, 0.0]])}, ValueError, "finite, .* image 1"),
    ({"cond_vectors": torch.full((3, 2), math.inf)}, ValueError, "finite, .* image 0"),
    ({"cond_vectors": torch.zeros(3, 2), "cond_images": torch.zeros(3, 1, 4, 4)}, ValueError, "takes none"),
    ({"cond_vectors": torch.zeros(3, 2), "num_sample": 3}, TypeError, "unexpected argument 'num_sample'"),
    ({"cond_vectors": torch.zeros(3, 2), "encoder_attention_mask": torch.ones(3, 4)}, ValueError, "each token"),
]


@pytest.mark.parametrize("given, error, message", BAD)
def test_wrong_conditions_are_refused_before_any_call(given, error, message):
    net, images = LinearGaussian(null=False), data(3)[0]
    for method in ("mc", "vlb", "ode"):
        with pytest.raises(error, match=message):
            measured(method, net, images, **given)
    assert net.rows == 0


def test_images_as_conditions_must_not_be_larger():
    with pytest.raises(ValueError, match="cond_images must be of at most 4×4 pixels, got 5×4"):
        check_conditions(LinearGaussian("cond_images"), 1, {"cond_images": torch.zeros(1, 2, 5, 4)})


def test_nulls_rows_and_withheld_rows():
    net = network(num_class_embeds=5, null_class=True, **CONDITIONS | {"null_images": False})
    given = {"class_labels": torch.tensor([1, 2, 3, 4]), "cond_vectors": VECTORS, "cond_images": IMAGES}
    nulls = null_conditions(net, given)
    assert nulls["class_labels"].tolist() == [5] * 4 and bool(nulls["cond_vectors"].isnan().all())
    assert torch.equal(nulls["cond_images"], IMAGES)  # this network knows no null of them
    rows = rows_of_conditions(given | {"encoder_hidden_states": None}, torch.tensor([2, 0]))
    assert rows["class_labels"].tolist() == [3, 1] and torch.equal(rows["cond_images"], IMAGES[[2, 0]])
    which = torch.tensor([True, False, False, True])
    assert withheld(given["class_labels"], which, 5).tolist() == [5, 2, 3, 5]
    hidden = withheld(IMAGES, which)
    assert bool(hidden[[0, 3]].isnan().all()) and torch.equal(hidden[1:3], IMAGES[1:3])


# ---- the pipeline ------------------------------------------------------------------------------------------------


def pipe_with(**arguments) -> VDMPipeline:
    unet = tiny_preset(zero_init=False, **arguments).eval()
    pipe = VDMPipeline(unet, VDMScheduler(), num_levels=17)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, count, **arguments):
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(num_inference_steps=3, generator=generator, output_type="latent", **arguments).images


def test_a_vector_for_all_images_is_one_for_each():
    pipe = pipe_with(cond_dim=2, null_vectors=True)
    one = drawn(pipe, 3, batch_size=3, cond_vectors=[0.5, -2.0])
    each = drawn(pipe, 3, cond_vectors=[[0.5, -2.0]] * 3)
    assert torch.equal(one, each) and one.shape == (3, 1, 8, 8)
    different = drawn(pipe, 3, cond_vectors=torch.tensor([[0.5, -2.0], [1.0, 1.0], [0.5, -2.0]]))
    assert torch.equal(different[[0, 2]], each[[0, 2]]) and not torch.allclose(different[1], each[1])
    several = drawn(pipe, 4, cond_vectors=[[0.5, -2.0], [1.0, 1.0]], num_images_per_prompt=2)
    torch.testing.assert_close(several[:2], one[:2], rtol=1e-3, atol=1e-3)  # batches of other sizes round differently
    without = drawn(pipe, 3, batch_size=3)
    torch.testing.assert_close(drawn(pipe, 3, cond_vectors=[[0.5, -2.0]] * 3, guidance_scale=0.0), without)
    assert not torch.allclose(drawn(pipe, 3, cond_vectors=[[0.5, -2.0]] * 3, guidance_scale=3.0), one)


def test_large_numbers_keep_the_digits_in_which_they_differ():
    pipe = pipe_with(cond_dim=1, cond_mean=[1.7e9], cond_std=[10.0])
    drawings = [drawn(pipe, 1, cond_vectors=[1.7e9 + shift]) for shift in (0.0, 5.0)]
    assert not torch.allclose(*drawings, atol=1e-4)
    torch.testing.assert_close(drawings[0], drawn(pipe_with(cond_dim=1), 1, cond_vectors=[0.0]))


def test_classes_vectors_and_images_are_conditions_together():
    pipe = pipe_with(cond_dim=1, num_class_embeds=3, cond_channels=1, null_images=True)
    picture = torch.rand(1, 4, 4, generator=seeded(3))
    given = {"class_labels": [0, 2], "cond_vectors": [0.5], "image": picture}
    whole = drawn(pipe, 2, **given)
    levels = diffusion.x_from_levels((picture * 16).round().long(), 17, torch.float32)
    tensors = drawn(pipe, 2, class_labels=[0, 2], cond_vectors=[[0.5]] * 2, cond_images=levels.expand(2, 1, 4, 4))
    assert torch.equal(whole, tensors)
    for name, other in (("class_labels", [1, 2]), ("cond_vectors", [0.7]), ("image", 1 - picture)):
        assert not torch.allclose(drawn(pipe, 2, **given | {name: other})[0], whole[0])


def test_an_image_may_be_edited_under_an_image_condition():
    pipe = pipe_with(cond_channels=1)
    picture = torch.rand(1, 8, 8, generator=seeded(3))
    arguments = {"image": picture, "strength": 0.5, "cond_images": torch.zeros(1, 1, 4, 4), "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    assert pipe(1, 4, generator, **arguments).images.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="cond_images must be given"):
        pipe(1, 4, image=picture, strength=0.5)


CALLS = [
    ({"cond_vectors": [1.0, 2.0, 3.0]}, ValueError, r"cond_vectors must have shape \(2,\) or \(B, 2\), got \(3,\)"),
    ({"cond_vectors": "red"}, TypeError, "cond_vectors must be a list, an array or a tensor of numbers, got a str"),
    ({"cond_vectors": [True, False]}, TypeError, "cond_vectors must be real numbers"),
    ({"cond_vectors": [[0.0, 1.0]] * 3}, ValueError, "cond_vectors must be one vector or 2 of them, got 3"),
    ({"cond_vectors": [0.0, math.nan]}, ValueError, "cond_vectors must be finite"),
    ({}, ValueError, "cond_vectors must be given"),
    ({"image": torch.rand(1, 9, 9)}, ValueError, "cond_images must be of at most 8×8 pixels"),
    ({"image": torch.rand(3, 4, 4)}, ValueError, r"cond_images must have shape \(2, 1, h, w\)"),
    ({"image": torch.rand(1, 4, 4) + 1}, ValueError, "image"),
    ({"image": torch.rand(1, 4, 4), "cond_images": torch.zeros(1, 1, 4, 4)}, ValueError, "either image or cond_im"),
    ({"cond_images": [[0.0]]}, TypeError, "cond_images must be a floating-point torch.Tensor"),
    ({"cond_vectors": [0.0, 1.0], "guidance_scale": 2.0}, ValueError, "needs a network with the null"),
]


@pytest.mark.parametrize("given, error, message", CALLS)
def test_wrong_conditions_of_a_call_are_refused_before_the_network_is_called(given, error, message):
    pipe, calls = pipe_with(cond_dim=2, cond_channels=1), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    defaults = {"cond_vectors": [0.0, 1.0], "image": torch.rand(1, 4, 4, generator=seeded(0))}
    if "cond_images" in given and "image" not in given:
        del defaults["image"]
    needed = defaults if given else {}
    with pytest.raises(error, match=message):
        pipe(2, 2, **needed | given)
    assert not calls


def test_conditions_that_a_network_does_not_take_are_refused():
    for given in ({"cond_vectors": [1.0]}, {"cond_images": torch.zeros(1, 1, 4, 4)}):
        with pytest.raises(ValueError, match="takes none"):
            pipe_with()(1, 2, **given)


def test_a_checkpoint_of_diffusers_with_classes_is_measured_given_them():
    """`UNet2DModel` has class embeddings and no null class; its config says so in the same words."""
    unet = network(1, UNet2DModel, num_class_embeds=3)
    images = torch.randint(0, 256, (6, 1, 8, 8), generator=seeded(1))
    found = []
    for labels in (torch.arange(6) % 3, (torch.arange(6) + 1) % 3):
        found += [evaluate_vlb(unet, DDPMScheduler(20), images, class_labels=labels, progress_bar=False).per_image_bpd]
    assert (found[0] != found[1]).all()
    with pytest.raises(ValueError, match=r"class_labels must be given, in \[0, 3\)"):
        evaluate_vlb(unet, DDPMScheduler(20), images, progress_bar=False)
    pipe = VDMPipeline(unet, VDMScheduler())
    with pytest.raises(ValueError, match="guidance_scale"):  # it knows no null class to be guided against
        pipe(class_labels=[0], guidance_scale=2.0, num_inference_steps=2)
