"""evaluation/ode_density.py: probabilities that are known, and what `evaluate_ode` promises."""

import math
import shutil

import numpy as np
import pytest
import torch
from scipy import integrate

from diffusers_vdm import FixedLinearGamma, LearnedLinearGamma, LinearBetaGamma
from diffusers_vdm.evaluation import ode_density as ode_evaluation
from diffusers_vdm.evaluation.dequantization import dequantize
from diffusers_vdm.evaluation.ode_density import evaluate_ode
from diffusers_vdm.ode import OdeSolution, eps_model, log_prob_nats
from tests.models import quiet_unet
from tests.oracles import (
    ENTROPY,
    PI,
    USED,
    X_VDM,
    BestNetwork,
    GaussianDenoiser,
    GaussianMixture,
    LabelledGaussianDenoiser,
    MixtureDenoiser,
    draw_images,
)
from tests.tensors import signs, uniform

# ---- evaluate_ode: numbers that are known -------------------------------------------------------------------------

EIGHT = torch.arange(8)[:, None]
PMF = torch.tensor([0.05, 0.3, 0.0, 0.1, 0.25, 0.02, 0.0, 0.28], dtype=torch.float64)
COARSE = FixedLinearGamma(-6.0, 14.0)


def eight_levels():
    """One dimension, 8 levels: the exact density at each γ, and the network of the posterior mean."""
    used = PMF > 0
    means = (2 * EIGHT[used].double() + 1) / 8 - 1
    data = GaussianMixture(PMF[used], means, torch.zeros(int(used.sum()), dtype=torch.float64))
    return data, MixtureDenoiser(data, COARSE), EIGHT[used], PMF[used]


def evaluate(*args, **kwargs):
    return evaluate_ode(*args, **{"progress_bar": False, **kwargs})


def test_probability_of_each_level():
    """With K draws −log₂ of the integral of the density over the bin; all levels add up to at most 1."""
    data, network, images, pmf = eight_levels()
    arguments = {"num_levels": 8, "divergence": "exact", "rtol": 1e-3, "atol": 1e-3}
    plain = evaluate(network, COARSE, images, num_samples=8, **arguments)
    tight = evaluate(network, COARSE, images, num_importance_samples=24, **arguments)
    a = 1 / math.sqrt(1 + math.exp(-6.0))
    probability = torch.tensor([
        integrate.quad(
            lambda z: float(data.log_density_nats(torch.tensor([[z]], dtype=torch.float64), -6.0).exp()),
            a * (k / 4 - 1), a * ((k + 1) / 4 - 1), epsabs=1e-9,
        )[0]
        for k in images.flatten().tolist()
    ])  # fmt: skip
    torch.testing.assert_close(tight.per_image_bpd.float(), -torch.log2(probability), rtol=0, atol=0.06)
    for result in (plain, tight):
        total = float((2.0**-result.per_image_bpd).sum())
        assert 0.95 < total <= float(probability.sum()) + 0.005 <= 1.005
        cross_entropy = float(pmf @ result.per_image_bpd)
        assert cross_entropy >= float(-(pmf * pmf.log2()).sum()) - 0.01
    assert (plain.gamma_start, plain.gamma_end, plain.num_probes, plain.num_samples) == (-6.0, 14.0, 0, 8)
    assert plain.num_importance_samples == 1 and tight.num_importance_samples == 24
    assert plain.bpd == pytest.approx(float(plain.per_image_bpd.mean()))


@pytest.mark.parametrize(("dequantization", "most"), [("truncated_normal", 0.03), ("uniform", 0.5), ("decoder", 0.1)])
def test_bound_is_above_the_entropy_of_factorized_data(dequantization, most):
    """256 levels with the posterior mean; for each image against its own −log₂ P."""
    schedule = FixedLinearGamma(-13.3, 5.0)
    network = BestNetwork(lambda timestep: -13.3 + 18.3 * timestep / 1000, X_VDM)
    images = draw_images(24, 1, 4, 4)
    result = evaluate(network, schedule, images, dequantization=dequantization, rtol=1e-3, atol=1e-3)
    ideal = torch.zeros(256, dtype=torch.float64)
    ideal[torch.from_numpy(USED)] = torch.from_numpy(-np.log2(PI))
    gap = result.per_image_bpd - ideal[images.long()].flatten(1).mean(1)
    assert 0 < float(gap.mean()) + 3 * float(gap.std()) / math.sqrt(24)
    assert float(gap.mean()) - 3 * float(gap.std()) / math.sqrt(24) < most
    assert result.bpd > ENTROPY - 4 * result.stderr_bpd
    assert result.dequantization == dequantization and result.num_probes == 1


def test_uniform_noise_must_not_start_where_the_density_is_a_comb():
    """At γ = −13.3 the density has 256 separate peaks, with uniform noise between them: evaluate_ode starts above."""
    schedule = FixedLinearGamma(-13.3, 5.0)
    network = BestNetwork(lambda timestep: -13.3 + 18.3 * timestep / 1000, X_VDM)
    images = draw_images(8, 1, 4, 4)
    advised = evaluate(network, schedule, images, dequantization="uniform", rtol=1e-3, atol=1e-3)
    assert advised.gamma_start == pytest.approx(-11.8)
    z, rest = dequantize("uniform", images, uniform(8, 1, 4, 4), -13.3, 256, torch.float64)
    solution = log_prob_nats(
        eps_model(network, schedule), z, -13.3, 5.0, probes=signs(1, 8, 1, 4, 4), rtol=1e-3, atol=1e-3
    )
    low = float(-(solution.log_prob_nats + rest).mean()) / 16 / math.log(2)
    assert low > advised.bpd + 0.3


def test_stated_errors_are_the_spread(monkeypatch):
    """Over 80 seeds, with the exact density in the place of the ODE."""
    data, network, _, pmf = eight_levels()
    ends = []

    def by_hand(model, z, start, end, **_):
        ends.append((start, end))
        log_prob = data.log_density_nats(z, start)
        return OdeSolution(z, log_prob, log_prob[None], torch.ones(len(z)))

    monkeypatch.setattr(ode_evaluation, "log_prob_nats", by_hand)
    drawn = torch.multinomial(pmf, 12, replacement=True, generator=torch.Generator().manual_seed(0))
    images = EIGHT[PMF > 0][drawn]
    for repeats in (2, 5):
        results = [
            evaluate(
                network, COARSE, images, num_levels=8, dequantization="uniform", num_samples=repeats, seed=s,
                divergence="exact",
            )
            for s in range(80)
        ]  # fmt: skip
        spread = float(np.std([r.bpd for r in results], ddof=1))
        stated = float(np.sqrt(np.mean([r.draws_stderr_bpd**2 for r in results])))
        assert 0.7 < spread / stated < 1.3
    last = results[-1]
    assert last.stderr_bpd == pytest.approx(float(last.per_image_bpd.std()) / math.sqrt(12))
    single = evaluate(network, COARSE, images[:1], num_levels=8, divergence="exact")
    assert math.isnan(single.draws_stderr_bpd) and math.isnan(single.stderr_bpd)
    assert set(ends) == {(last.gamma_start, 14.0), (-6.0, 14.0)} and last.gamma_end == 14.0
    assert last.gamma_start == pytest.approx(-11.8 + 2 * math.log(32))


# ---- evaluate_ode: what it promises ------------------------------------------------------------------------------

SHORT = FixedLinearGamma(-4.0, 6.0)
FAST = {"num_levels": 8, "rtol": 1e-3, "atol": 1e-3}


def five(num=5):
    """Images of 2 dimensions, a label for each, and the network that knows each by its label."""
    images = torch.randint(0, 8, (num, 2), generator=torch.Generator().manual_seed(8))
    labels = torch.arange(num)
    network = LabelledGaussianDenoiser(
        torch.linspace(-0.5, 0.5, num).tolist(), (0.5 ** torch.arange(2, num + 2)).tolist(), SHORT
    )
    return network, images, labels


@pytest.mark.parametrize("dequantization", ["truncated_normal", "uniform", "decoder"])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_no_image_depends_on_the_batch_and_none_is_dropped(divergence, dequantization):
    network, images, labels = five()
    results = [
        evaluate(
            network, SHORT, images, class_labels=labels, batch_size=size, num_samples=2, num_importance_samples=2,
            num_probes=2, divergence=divergence, dequantization=dequantization, **FAST,
        )
        for size in (1, 2, 7)
    ]  # fmt: skip
    for result in results:
        assert result.per_image_bpd.shape == result.num_calls.shape == (5,) and result.num_images == 5
        torch.testing.assert_close(result.per_image_bpd, results[0].per_image_bpd, rtol=1e-12, atol=0)
        assert torch.equal(result.num_calls, results[0].num_calls)
    assert results[0].num_probes == (2 if divergence == "hutchinson" else 0)
    other = evaluate(network, SHORT, images, class_labels=labels, seed=1, dequantization=dequantization, **FAST)
    assert float((other.per_image_bpd - results[0].per_image_bpd).abs().min()) > 1e-6


def test_draws_are_keyed_by_image_repeat_and_seed(monkeypatch):
    """Equal images, repeats and importance samples each have their own noise."""
    network, images, _ = five()
    images = images[:1].expand(3, 2)
    seen = []

    def record(kind, levels, noise, *args):
        seen.append(noise)
        return dequantize(kind, levels, noise, *args)

    monkeypatch.setattr(ode_evaluation, "dequantize", record)
    evaluate(
        network,
        SHORT,
        images,
        class_labels=torch.zeros(3).long(),
        num_samples=2,
        num_importance_samples=2,
        num_probes=2,
        **FAST,
    )
    values = torch.cat(seen).flatten()
    assert len(values) == 24 == len(values.unique()) and values.dtype == torch.float64


RESUMED = {"class_labels": torch.arange(5), "batch_size": 2, "num_samples": 2, **FAST}


def test_resumed_evaluation_is_the_one_that_was_not_interrupted(tmp_path):
    network, images, labels = five()
    whole = evaluate(network, SHORT, images, **RESUMED)
    total = len(network.batches)
    first = batches_of(network, images[:2], labels[:2])

    network, _, _ = five()
    network.interrupt_at = first + 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, SHORT, images, resume_dir=tmp_path, **RESUMED)
    network.batches, network.interrupt_at = [], None
    resumed = evaluate(network, SHORT, images, resume_dir=tmp_path, **RESUMED)
    assert torch.equal(resumed.per_image_bpd, whole.per_image_bpd) and resumed.bpd == whole.bpd
    assert torch.equal(resumed.num_calls, whole.num_calls) and resumed.draws_stderr_bpd == whole.draws_stderr_bpd
    assert len(network.batches) == total - first


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished evaluation, its result, and how many batches it took."""
    folder = tmp_path_factory.mktemp("finished")
    network, images, _ = five()
    whole = evaluate(network, SHORT, images, resume_dir=folder, **RESUMED)
    return folder, whole, len(network.batches)


def test_a_finished_evaluation_calls_the_network_no_more(finished):
    folder, whole, _ = finished
    network, images, _ = five()
    again = evaluate(network, SHORT, images, resume_dir=folder, **RESUMED)
    assert not network.batches and torch.equal(again.per_image_bpd, whole.per_image_bpd)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"rtol": 1e-2}, "rtol was 0.001 and is 0.01"),
        ({"dequantization": "uniform"}, "dequantization was"),
        ({"divergence": "exact"}, "divergence was"),
        ({"class_labels": torch.arange(5).flip(0)}, "class_labels was"),
        ({"num_probes": 2}, "num_probes was 1 and is 2"),
        ({"num_importance_samples": 2, "num_probes": 2}, "num_importance_samples was 1 and is 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_evaluation_is_not_resumed(finished, other, difference):
    network, images, _ = five()
    with pytest.raises(ValueError, match=difference):
        evaluate(network, SHORT, images, resume_dir=finished[0], **{**RESUMED, **other})


def test_more_repeats_continue_a_finished_evaluation(finished, tmp_path):
    folder, _, total = finished
    network, images, _ = five()
    copy = shutil.copytree(folder, tmp_path / "copy")
    more = evaluate(network, SHORT, images, resume_dir=copy, **{**RESUMED, "num_samples": 3})
    assert more.num_samples == 3 and network.batches and len(network.batches) < total


def batches_of(network, images, labels):
    before = len(network.batches)
    evaluate(network, SHORT, images, class_labels=labels, batch_size=2, **FAST)
    return len(network.batches) - before


def test_a_refused_argument_leaves_resume_dir_as_it_was(tmp_path):
    network, images, labels = five()
    for wrong in ({"divergence": "trace"}, {"rtol": 0.0}, {"atol": -1.0}, {"prediction_type": "eps"}):
        with pytest.raises(ValueError, match="must be"):
            evaluate(network, SHORT, images, class_labels=labels, resume_dir=tmp_path, **{**FAST, **wrong})
    result = evaluate(network, SHORT, images, class_labels=labels, resume_dir=tmp_path, **FAST)
    assert math.isfinite(result.bpd)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_levels": 4}, r"within \[0, 4\)"),
        ({"dequantization": "normal"}, "dequantization must be one of"),
        ({"divergence": "trace"}, "divergence must be one of"),
        ({"rtol": 0.0}, "rtol and atol must be positive"),
        ({"atol": 0.0}, "rtol and atol must be positive"),
        ({"prediction_type": "eps"}, "prediction_type must be one of"),
        ({"num_samples": 0}, "num_samples must be a positive integer"),
        ({"num_importance_samples": 1.5}, "num_importance_samples must be a positive integer"),
        ({"num_probes": 0}, "num_probes must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(wrong, message):
    network, images, labels = five()
    with pytest.raises(ValueError, match=message):
        evaluate(network, SHORT, images, **{"class_labels": labels, **FAST, **wrong})


def test_images_of_floats_are_refused():
    network, images, labels = five()
    with pytest.raises(TypeError, match="integers"):
        evaluate(network, SHORT, images.float(), class_labels=labels, **FAST)


def test_no_images_are_refused():
    network, images, _ = five()
    with pytest.raises(ValueError, match="must not be empty"):
        evaluate(network, SHORT, images[:0], **FAST)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_image_for_which_the_network_returns_nan_is_named(size):
    network, images, labels = five()
    network.data.mean[3] = math.nan
    with pytest.raises(ValueError, match="image 3: the network returned NaN or infinity"):
        evaluate(network, SHORT, images, class_labels=labels, batch_size=size, **FAST)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_image_that_needs_too_many_steps_is_named(size):
    network, images, labels = five()
    smooth = network.forward
    # image 4 needs more steps than the others
    network.forward = lambda z, t, class_labels, **more: (
        smooth(z, t, class_labels)[0] + (class_labels == 4)[:, None] * torch.sin(30 * z),
    )
    arguments = {"class_labels": labels, **FAST, "rtol": 1e-6, "atol": 1e-6}
    calls = evaluate(network, SHORT, images, **arguments).num_calls
    steps = int(calls[:4].max() + 5) // 6
    assert calls[4] > calls[:4].max() + 6
    message = f"image 4: .* within max_steps={steps} steps.*increase rtol and atol, or max_steps"
    with pytest.raises(ValueError, match=message):
        evaluate(network, SHORT, images, batch_size=size, max_steps=steps, **arguments)


@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_evaluation_leaves_the_network_unchanged_with_and_without_gradients(divergence):
    """Modes, gradients and requires_grad; labels and a learned schedule under no_grad and inference_mode."""
    unet, schedule = quiet_unet(num_class_embeds=3, dropout=0.5, sample_size=4), LearnedLinearGamma(-4.0, 4.0)
    unet.train()
    unet.mid_block.eval()
    frozen = next(unet.parameters()).requires_grad_(False)
    num = 2 if divergence == "hutchinson" else 1
    images = torch.randint(0, 8, (num, 1, 4, 4), generator=torch.Generator().manual_seed(8))
    arguments = {"class_labels": torch.tensor([2, 0])[:num], "divergence": divergence, "num_levels": 8}
    arguments |= {"rtol": 0.1, "atol": 0.1, "prediction_type": "v_prediction"}
    plain = evaluate(unet, schedule, images, **arguments)
    with torch.no_grad():
        assert evaluate(unet, schedule, images, **arguments).bpd == plain.bpd
    with torch.inference_mode():
        inside = {**arguments, "class_labels": arguments["class_labels"].clone()}
        assert evaluate(unet, schedule, images.clone(), **inside).bpd == plain.bpd
    assert unet.training and not unet.mid_block.training and unet.conv_in.training
    for module in (unet, schedule):
        for parameter in module.parameters():
            assert parameter.grad is None and parameter.requires_grad == (parameter is not frozen)
    assert not plain.per_image_bpd.requires_grad


def test_modes_are_restored_after_an_error():
    network, images, labels = five()
    network.train()
    network.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, SHORT, images, class_labels=labels, **FAST)
    assert network.training


@pytest.mark.parametrize("total", [20, 50, 200])
def test_the_last_step_does_not_leave_the_table(total):
    """γ + (end − γ) may round to beyond the end, which a table of betas has no level for."""
    schedule = LinearBetaGamma(total, rescale_betas=False)
    network = GaussianDenoiser(schedule, variance=0.3)
    images = torch.randint(0, 256, (40, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for tolerance in (0.5, 0.1, 0.02):
        assert math.isfinite(evaluate(network, schedule, images, rtol=tolerance, atol=tolerance, num_levels=256).bpd)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, r"class_labels must be given, in \[0, 3\)"),
        (torch.tensor([0, 3]), ValueError, r"within \[0, 3\), got values from 0 to 3"),
        (torch.tensor([0]), ValueError, r"shape \(2,\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "integers"),
        ([0, 1], TypeError, "tensor of integers, got list"),
    ],
    ids=["none", "range", "number", "floats", "list"],
)
def test_labels_must_be_classes_of_the_network(labels, error, message):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        evaluate(quiet_unet(num_class_embeds=3), FixedLinearGamma(-4.0, 4.0), images, class_labels=labels)


@pytest.mark.parametrize("shape", [(2, 1, 4, 8), (2, 3, 8, 8), (1, 8, 8)], ids=["height", "channels", "rank"])
def test_images_must_have_the_size_of_the_network(shape):
    images, labels = torch.zeros(shape, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="of the network's size"):
        evaluate(quiet_unet(num_class_embeds=3), FixedLinearGamma(-4.0, 4.0), images, class_labels=labels)
