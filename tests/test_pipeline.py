"""pipeline.py: `VDMPipeline` behaves like a pipeline of diffusers, and its own arguments do what they say."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)

from diffusers_vdm import (
    FixedLinearGamma,
    LearnedLinearGamma,
    LinearBetaScheduler,
    MonotoneGammaNetwork,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
    noise_schedules,
    schedulers,
    unet,
)
from tests.models import curved_gamma, network, pipeline, sample
from tests.running import run_python
from tests.tensors import seeded

# ---- saving and loading -------------------------------------------------------------------------------------------


def test_file_format(tmp_path):
    # saved pipelines name module paths: to rename a file breaks them
    schedule = curved_gamma()
    pipeline(VDMScheduler.from_noise_schedule(schedule), schedule, num_levels=17).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {key: value for key, value in index.items() if key != "_diffusers_version"} == {
        "_class_name": "VDMPipeline",
        "unet": ["diffusers_vdm.unet", "VDMUNet2DModel"],
        "scheduler": ["diffusers_vdm.schedulers", "VDMScheduler"],
        "noise_schedule": ["diffusers_vdm.noise_schedules", "MonotoneGammaNetwork"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "num_levels": 17,
    }
    assert VDMPipeline.__module__ == "diffusers_vdm.pipeline"
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "noise_schedule/config.json",
        "noise_schedule/diffusion_pytorch_model.safetensors",
    }


def test_modules_hold_the_names_that_diffusers_looks_for():
    assert unet.ModelMixin and noise_schedules.ModelMixin and schedulers.SchedulerMixin


@pytest.mark.parametrize("with_schedule", [False, True])
@pytest.mark.parametrize("kind", ["learned", "linear beta"])
def test_saved_pipeline_gives_the_same_samples(with_schedule, kind, tmp_path):
    schedule = curved_gamma()
    scheduler = LinearBetaScheduler(timestep_spacing="trailing")
    if kind == "learned":
        scheduler = VDMScheduler.from_noise_schedule(schedule)
    pipe = pipeline(scheduler, schedule if with_schedule else None, num_levels=17, channels=1)
    pipe.save_pretrained(tmp_path)
    loaded = VDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is VDMPipeline and type(loaded.scheduler) is type(scheduler)
    assert loaded.config.num_levels == 17
    same_samples(loaded, pipe)
    if with_schedule:
        assert type(loaded.noise_schedule) is MonotoneGammaNetwork
        assert torch.equal(loaded.noise_schedule.table(33), schedule.table(33))
    else:
        assert loaded.noise_schedule is None
    # and once more: what was loaded can be saved
    loaded.save_pretrained(tmp_path / "again")
    again = VDMPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    same_samples(again, pipe)


def same_samples(loaded: VDMPipeline, pipe: VDMPipeline) -> None:
    weights = pipe.unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.unet.state_dict().items())
    # convolutions sum in another order where the file put the weights at another alignment; float64 does not care
    for p in (loaded, pipe):
        p.unet.double()
    torch.testing.assert_close(sample(loaded), sample(pipe), rtol=1e-10, atol=1e-10)
    assert torch.equal(sample(loaded, output_type="pt"), sample(pipe, output_type="pt"))


def test_every_schedule_is_saved_and_loaded_with_its_pipeline(tmp_path):
    for i, schedule in enumerate((FixedLinearGamma(-9.0, 4.0), LearnedLinearGamma(-9.0, 4.0), curved_gamma())):
        pipeline(VDMScheduler.from_noise_schedule(schedule), schedule).save_pretrained(tmp_path / str(i))
        loaded = VDMPipeline.from_pretrained(tmp_path / str(i))
        assert type(loaded.noise_schedule) is type(schedule)
        assert torch.equal(loaded.noise_schedule.table(9), schedule.table(9))


def test_pipeline_with_a_stock_network_is_saved_and_loaded(tmp_path):
    pipe = pipeline(LinearBetaScheduler(), cls=UNet2DModel)
    pipe.save_pretrained(tmp_path)
    loaded = VDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is UNet2DModel
    same_samples(loaded, pipe)


def test_loading_needs_our_class(tmp_path):
    # docs/sharing.md states this fact of diffusers: should it change, so should the page
    pipeline().save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="VDMPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_loading_needs_one_import_only(tmp_path):
    schedule = curved_gamma()
    pipe = pipeline(VDMScheduler.from_noise_schedule(schedule), schedule)
    pipe.save_pretrained(tmp_path)
    program = f"""
import torch
from diffusers_vdm import VDMPipeline
torch.set_num_threads(1)
pipe = VDMPipeline.from_pretrained({str(tmp_path)!r})
pipe.set_progress_bar_config(disable=True)
images = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type="latent").images
print(repr(float(images.double().sum())), type(pipe.noise_schedule).__name__)
"""
    total, name = run_python("-c", program).stdout.split()
    assert name == "MonotoneGammaNetwork"
    assert float(total) == pytest.approx(float(sample(pipe).double().sum()), rel=1e-4, abs=1e-4)


def test_components_and_from_pipe():
    schedule = curved_gamma()
    pipe = pipeline(VDMScheduler.from_noise_schedule(schedule), schedule, num_levels=17)
    assert set(pipe.components) == {"unet", "scheduler", "noise_schedule", "text_encoder", "tokenizer"}
    expected = sample(pipe)
    for other in (VDMPipeline(**pipe.components, num_levels=17), VDMPipeline.from_pipe(pipe)):
        other.set_progress_bar_config(disable=True)
        assert other.unet is pipe.unet and other.noise_schedule is schedule
        assert other.config.num_levels == 17
        assert torch.equal(sample(other), expected)
    # another sampler around the same network
    other = VDMPipeline.from_pipe(pipe, scheduler=VDMScheduler())
    assert other.unet is pipe.unet and other.scheduler is not pipe.scheduler


def test_scheduler_is_complete_without_the_module():
    schedule = curved_gamma()
    scheduler = VDMScheduler.from_noise_schedule(schedule)
    with_it, without = pipeline(scheduler, schedule), pipeline(scheduler)
    assert torch.equal(sample(with_it), sample(without))
    with torch.no_grad():  # sampling reads the table only
        schedule.output_weight.zero_()
    assert torch.equal(sample(with_it), sample(without))


MISSING = [
    "runs/my model", "./missing", "../missing", "/abs/missing", "a/b/c", "~/missing", "", "missing/", "runs\\model",
    "user/" + "n" * 97, "-user/name", "user/na..me", "C:\\runs",
]  # fmt: skip


@pytest.mark.parametrize("path", MISSING)
@pytest.mark.parametrize("local_files_only", [False, True])
def test_a_path_that_is_no_folder_and_no_name_of_the_hub_is_refused(path, local_files_only):
    with pytest.raises(OSError, match="neither a local folder nor a valid Hub name") as error:
        VDMPipeline.from_pretrained(path, local_files_only=local_files_only)
    assert repr(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(OSError, match="is a file and not the folder of a pipeline"):
        VDMPipeline.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize("arguments", [{"safe_serialization": False}, {"use_flashpack": True}])
def test_formats_that_could_not_be_loaded_are_not_saved(arguments, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must"):
        pipeline().save_pretrained(tmp_path / "new", **arguments)
    with pytest.raises(ValueError, match="safe_serialization must"):
        pipeline().save_pretrained(tmp_path / "new", False)
    assert not (tmp_path / "new").exists()
    # a network alone is loaded from what it is saved to
    net = network()
    net.save_pretrained(tmp_path / "alone", safe_serialization=False)
    loaded = VDMUNet2DModel.from_pretrained(tmp_path / "alone", use_safetensors=False)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_saving_in_parts_and_with_a_variant_as_diffusers_does(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path, True, "half", max_shard_size="20KB")
    assert len([*(tmp_path / "unet").glob("*-of-*")]) > 2
    same_samples(loaded_quietly(tmp_path, variant="half"), pipe)
    with pytest.raises(ValueError, match="no such modeling files are available. .* has 'half'") as error:
        VDMPipeline.from_pretrained(tmp_path, variant="fp16")
    # what diffusers says, in a folder and on the Hub
    assert "model files of the `variant=fp16`, but no such modeling files are available. " in str(error.value)


def loaded_quietly(folder, **arguments):
    pipe = VDMPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("num_levels", [1, 257, 0])
def test_wrong_numbers_of_levels_are_refused(num_levels):
    with pytest.raises(ValueError, match=r"num_levels must be within \[2, 256\]"):
        pipeline(num_levels=num_levels)


# ---- what it returns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_output_types(channels, num_levels):
    pipe = pipeline(num_levels=num_levels, channels=channels, sample_size=(8, 6))
    images = {kind: sample(pipe, batch_size=2, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert images["latent"].shape == images["pt"].shape == (2, channels, 8, 6)
    assert images["np"].shape == (2, 8, 6, channels)
    assert isinstance(images["np"], np.ndarray) and images["np"].dtype == np.float32
    assert images["pt"].dtype == images["latent"].dtype == torch.float32
    levels = images["pt"].double() * (num_levels - 1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert images["pt"].min() >= 0 and images["pt"].max() <= 1
    assert len(levels.round().unique()) > (num_levels > 2)
    np.testing.assert_array_equal(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    assert [image.size for image in images["pil"]] == [(6, 8)] * 2
    assert images["pil"][0].mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    pixels = np.stack([np.asarray(image).reshape(8, 6, channels) for image in images["pil"]])
    np.testing.assert_array_equal(pixels, np.round(255 * images["np"]))
    # the mode of p(x | z_0) is the level nearest to z_0/α_0
    x = images["latent"].double() / torch.sigmoid(torch.tensor(13.3, dtype=torch.float64)).sqrt()
    nearest = ((x + 1) * num_levels / 2).floor().clamp(0, num_levels - 1)
    assert torch.equal(nearest, levels.round())


def test_return_dict():
    pipe = pipeline()
    as_tuple = pipe(num_inference_steps=2, generator=seeded(), output_type="pt", return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert torch.equal(as_tuple[0], pipe(num_inference_steps=2, generator=seeded(), output_type="pt").images)
    assert pipe(num_inference_steps=1, generator=seeded()).images[0].size == (8, 8)  # PIL by default


def test_number_of_steps():
    pipe = pipeline()
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(float(args[1])))
    sample(pipe, num_inference_steps=5)
    assert len(calls) == pipe.num_timesteps == 5
    np.testing.assert_allclose(calls, [1000, 800, 600, 400, 200], rtol=1e-6)
    calls.clear()
    sample(pipe, num_inference_steps=None)
    assert len(calls) == pipe.num_timesteps == 250
    calls.clear()
    sample(pipe, num_inference_steps=None, timesteps=[990.0, 500.5, 3.25])
    assert calls == [990.0, 500.5, 3.25]


def test_sampling_is_that_of_the_scheduler():
    # the loop of the pipeline, written out
    pipe, source = pipeline(VDMScheduler.from_noise_schedule(curved_gamma())), seeded(7)
    latents = torch.randn(2, 3, 8, 8, generator=source)
    scheduler = VDMScheduler.from_noise_schedule(curved_gamma())
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        with torch.no_grad():
            eps_hat = pipe.unet(latents, t).sample
        latents = scheduler.step(eps_hat, t, latents, generator=source).prev_sample
    assert torch.equal(sample(pipe, batch_size=2), latents)


def test_no_gradients_and_no_change_of_mode():
    pipe = pipeline()
    pipe.unet.train()
    assert not sample(pipe).requires_grad
    assert pipe.unet.training  # the mode of the network is up to the caller


# ---- randomness --------------------------------------------------------------------------------------------------


def test_samples_depend_on_the_generator_alone():
    pipe = pipeline()
    assert torch.equal(sample(pipe), sample(pipe))
    assert not torch.equal(sample(pipe), sample(pipe, generator=seeded(8)))
    state = torch.get_rng_state()
    sample(pipe, output_type="pt", decode="sample")
    assert torch.equal(torch.get_rng_state(), state)
    batch = sample(pipe, batch_size=3)
    assert not torch.equal(batch[0], batch[1]) and not torch.equal(batch[1], batch[2])


@pytest.mark.parametrize("decode", ["mode", "sample"])
def test_list_of_generators_makes_images_independent_of_their_batch(decode):
    pipe = pipeline(VDMScheduler(gamma_min=-3.0), num_levels=17)
    pipe.unet.double()  # so that the batch size changes no digit that matters
    kwargs = {"decode": decode, "output_type": "pt"}
    batch = sample(pipe, batch_size=3, generator=[seeded(s) for s in (5, 6, 7)], **kwargs)
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(batch[i], sample(pipe, generator=[seeded(seed)], **kwargs)[0])
        assert torch.equal(batch[i], sample(pipe, generator=seeded(seed), **kwargs)[0])
    swapped = sample(pipe, batch_size=3, generator=[seeded(s) for s in (7, 6, 5)], **kwargs)
    assert torch.equal(swapped.flip(0), batch)


def test_decode_by_sampling():
    # a high γ_0 leaves p(x | z_0) wide: draws then differ from its mode, and from each other
    pipe = pipeline(VDMScheduler(gamma_min=-2.0), num_levels=17)
    source = seeded(7)
    latents = sample(pipe, generator=source)
    mode = sample(pipe, output_type="pt")
    drawn = sample(pipe, output_type="pt", decode="sample")
    assert not torch.equal(mode, drawn)
    assert torch.equal(drawn, sample(pipe, output_type="pt", decode="sample"))
    assert torch.equal(latents, sample(pipe, decode="sample"))  # the chain itself is the same
    # at the γ_0 of the paper there is next to nothing to draw
    narrow = pipeline(VDMScheduler(), num_levels=17)
    assert torch.equal(sample(narrow, output_type="pt"), sample(narrow, output_type="pt", decode="sample"))


def test_latents_argument():
    pipe = pipeline()
    z_1 = torch.randn(2, 3, 8, 8, generator=seeded(1))
    before = z_1.clone()
    first = sample(pipe, batch_size=2, latents=z_1)
    assert torch.equal(first, sample(pipe, batch_size=2, latents=z_1))
    assert torch.equal(z_1, before)
    assert not torch.equal(first, sample(pipe, batch_size=2, latents=-z_1))
    # the same as drawing them, as long as the noise that follows is the same
    source = seeded(7)
    drawn = torch.randn(2, 3, 8, 8, generator=source)
    assert torch.equal(sample(pipe, batch_size=2, latents=drawn, generator=source), sample(pipe, batch_size=2))


# ---- callbacks and the bar ---------------------------------------------------------------------------------------


def test_callback_sees_every_step():
    pipe, seen = pipeline(), []

    def callback(this, step, timestep, tensors):
        assert this is pipe and pipe.num_timesteps == 4
        seen.append((step, float(timestep), {name: tensor.clone() for name, tensor in tensors.items()}))
        return {}

    final = sample(pipe, callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert all(set(tensors) == {"latents"} for _, _, tensors in seen)
    assert torch.equal(seen[-1][2]["latents"], final)
    assert torch.equal(sample(pipe), final)  # a callback that only reads changes nothing
    # without tensor names the callback gets no tensors, and it may return nothing
    seen.clear()
    sample(pipe, callback_on_step_end=lambda p, i, t, given: seen.append(given), callback_on_step_end_tensor_inputs=[])
    assert seen == [{}] * 4
    assert VDMPipeline._callback_tensor_inputs == ["latents"]


def test_callback_can_replace_the_latents():
    pipe = pipeline()
    replaced = torch.full((1, 3, 8, 8), 0.25)
    final = sample(pipe, callback_on_step_end=lambda p, i, t, given: {"latents": replaced} if i == 3 else {})
    assert torch.equal(final, replaced)
    # replaced earlier, the chain continues from these latents
    early = sample(pipe, callback_on_step_end=lambda p, i, t, given: {"latents": replaced} if i == 1 else {})
    assert not torch.equal(early, sample(pipe)) and not torch.equal(early, replaced)


def test_progress_bar(capsys):
    pipe = pipeline()
    sample(pipe)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    pipe.set_progress_bar_config(disable=False, desc="drawing", leave=True)
    sample(pipe)
    assert "drawing" in capsys.readouterr().err


# ---- classes -----------------------------------------------------------------------------------------------------


def test_class_labels_choose_the_class():
    pipe = pipeline(num_class_embeds=4)
    first = sample(pipe, batch_size=2, class_labels=1)
    assert torch.equal(first, sample(pipe, batch_size=2, class_labels=[1, 1]))
    assert torch.equal(first, sample(pipe, batch_size=2, class_labels=torch.tensor([1, 1])))
    other = sample(pipe, batch_size=2, class_labels=[1, 3])
    torch.testing.assert_close(other[0], first[0])
    assert (other[1] - first[1]).abs().max() > 1e-3


def test_null_class_stands_for_no_label():
    pipe = pipeline(num_class_embeds=4, null_class=True)
    without = sample(pipe)
    assert torch.equal(without, sample(pipe, class_labels=4))
    assert not torch.equal(without, sample(pipe, class_labels=0))


def test_images_per_label_are_those_of_the_repeated_labels():
    pipe = pipeline(num_class_embeds=4)
    expected = sample(pipe, batch_size=6, class_labels=[2, 2, 2, 0, 0, 0])  # diffusers' order
    for given in ({}, {"batch_size": 6}, {"batch_size": np.int32(6)}):
        actual = sample(pipe, class_labels=[2, 0], num_images_per_prompt=3, **given)
        assert torch.equal(actual, expected)
    assert torch.equal(sample(pipe, class_labels=1, num_images_per_prompt=2), sample(pipe, class_labels=[1, 1]))
    # one generator and one latent for each image
    each = [seeded(seed) for seed in range(4)]
    latents = torch.randn(4, 3, 8, 8, generator=seeded(1))
    images = sample(pipe, class_labels=[1, 3], num_images_per_prompt=2, generator=each, latents=latents)
    assert images.shape == latents.shape
    with pytest.raises(ValueError, match="list of batch_size=4, got 2"):
        sample(pipe, class_labels=[1, 3], num_images_per_prompt=2, generator=each[:2])


def test_the_labels_say_how_many_images():
    pipe = pipeline(num_class_embeds=4, null_class=True)
    assert sample(pipe, class_labels=[0, 1, 2]).shape[0] == 3
    assert sample(pipe, class_labels=2).shape[0] == sample(pipe).shape[0] == 1


EQUAL_ARGUMENTS = {
    "batch_size": [2, np.int64(2), np.uint8(2), torch.tensor(2)],
    "num_inference_steps": [3, np.int64(3), torch.tensor(3)],
    "class_labels": [
        [1, 3], (1, 3), range(1, 4, 2), np.array([1, 3]), np.array([1, 3], np.uint8), torch.tensor([1, 3]),
        torch.tensor([1, 3], dtype=torch.int32), [np.int64(1), 3], [torch.tensor(1), np.array(3)],
    ],
    "timesteps": [
        [900, 500.5, 3], (900.0, 500.5, 3.0), np.array([900, 500.5, 3]), torch.tensor([900, 500.5, 3]),
        [np.float32(900), np.float64(500.5), np.int64(3)], list(torch.tensor([900, 500.5, 3])),
    ],
    "return_dict": [True, np.True_],
    "callback_on_step_end_tensor_inputs": [None, ["latents"], ("latents",), []],
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL_ARGUMENTS)
def test_equal_arguments_of_other_types_give_equal_samples(name):
    pipe = pipeline(num_class_embeds=4)
    given = {"batch_size": 2, "class_labels": [0, 2], "generator": (seeded(1), seeded(2))}
    given |= {"num_inference_steps": None} if name == "timesteps" else {}
    results = []
    for value in EQUAL_ARGUMENTS[name]:
        given["generator"] = tuple(seeded(seed) for seed in (1, 2))
        results.append(sample(pipe, **{**given, name: value}))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("label", [1, np.int64(1), np.uint8(1), torch.tensor(1), np.array(1)])
def test_one_label_for_all(label):
    pipe = pipeline(num_class_embeds=4)
    assert torch.equal(sample(pipe, batch_size=2, class_labels=label), sample(pipe, class_labels=[1, 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_any_precision_are_worked_on_in_float32_or_better(dtype):
    pipe, latents = pipeline(), torch.randn(1, 3, 8, 8, generator=seeded(1)).to(dtype)
    images = sample(pipe, latents=latents)
    assert images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.float64:  # whose noise is drawn in float64, too
        assert torch.equal(images, sample(pipe, latents=latents.float()))


def test_latents_that_a_callback_returns_keep_their_type():
    final = sample(pipeline(), callback_on_step_end=lambda p, i, t, given: {"latents": given["latents"].half()})
    assert final.dtype == torch.float32


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network_keeps_float32_latents(dtype):
    pipe = pipeline(fourier_exponents=(6, 7))
    pipe.unet.to(dtype)
    dtypes, inputs = [], []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    final = sample(pipe, callback_on_step_end=lambda p, i, t, given: dtypes.append(given["latents"].dtype))
    assert {*dtypes, *inputs, final.dtype} == {torch.float32}
    assert final.isfinite().all()
    assert isinstance(sample(pipe, output_type="np"), np.ndarray)


def test_half_precision_stock_network_gets_what_it_can_take():
    pipe = pipeline(cls=UNet2DModel)
    pipe.unet.to(torch.bfloat16)
    inputs = []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    assert sample(pipe).dtype == torch.float32
    assert set(inputs) == {torch.bfloat16}


# its new name, `dtype`, is not known to the oldest diffusers that is supported
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_casting_the_pipeline_leaves_the_noise_levels_alone(tmp_path):
    schedule = LearnedLinearGamma()
    with torch.no_grad():
        schedule.bias.fill_(-13.3717)
        schedule.weight.fill_(24.6731)  # γ(1) = 11.3014, which bfloat16 would make 11.3125
    table = schedule.table(65)
    pipe = pipeline(VDMScheduler.from_noise_schedule(schedule), schedule)
    x, noise = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)

    def levels(p):
        p.scheduler.set_timesteps(7)
        alphas = [p.scheduler.add_noise(x, noise, t[None]).flatten()[0] for t in p.scheduler.timesteps]
        return p.scheduler.timesteps.clone(), torch.stack(alphas), p.scheduler.final_gamma

    expected = levels(pipe)
    pipe.save_pretrained(tmp_path)
    for other in (pipe.to(torch.bfloat16), VDMPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)):
        assert other.unet.dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in other.noise_schedule.parameters())
        assert torch.equal(other.noise_schedule.table(65), table)
        for actual, value in zip(levels(other), expected, strict=True):
            assert torch.equal(actual, value)


# ---- with the schedulers and networks of diffusers ---------------------------------------------------------------

# some schedulers of diffusers hand tensors to numpy.array, which NumPy 2.4 deprecates
DIFFUSERS_AND_NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("scheduler", [VDMScheduler, LinearBetaScheduler])
def test_stock_network_with_our_schedulers(scheduler):
    images = sample(pipeline(scheduler(), cls=UNet2DModel), output_type="pt")
    assert images.isfinite().all() and 0 <= images.min() < images.max() <= 1


@DIFFUSERS_AND_NUMPY
@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
@pytest.mark.parametrize("cls", [VDMUNet2DModel, UNet2DModel])
def test_schedulers_of_diffusers(scheduler, cls):
    pipe = pipeline(scheduler(), cls=cls)
    latents = sample(pipe, batch_size=2, generator=[seeded(1), seeded(2)])
    assert latents.isfinite().all()
    images = sample(pipe, output_type="pt")
    assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize("cls", [VDMUNet2DModel, UNet2DModel])
def test_equal_to_the_ddpm_pipeline_of_diffusers(cls):
    net = network(cls=cls)
    scheduler = DDPMScheduler(clip_sample=False)
    theirs = DDPMPipeline(net, scheduler)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(batch_size=2, num_inference_steps=5, generator=seeded(7), output_type="np").images
    latents = sample(pipeline_of(net, scheduler), batch_size=2, num_inference_steps=5)
    actual = (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def pipeline_of(net, scheduler) -> VDMPipeline:
    pipe = VDMPipeline(net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scheduler", [VDMScheduler, LinearBetaScheduler])
def test_our_schedulers_in_the_ddpm_pipeline_of_diffusers(scheduler):
    net = network()
    theirs = DDPMPipeline(net, scheduler())
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(batch_size=2, num_inference_steps=5, generator=seeded(7), output_type="np").images
    latents = sample(pipeline_of(net, scheduler()), batch_size=2, num_inference_steps=5)
    actual = (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@DIFFUSERS_AND_NUMPY
def test_scaled_noise_and_inputs_are_honored():
    # Euler starts from σ_max and divides its input by √(1 + σ²): without either, the network sees other noise
    pipe, seen = pipeline(EulerDiscreteScheduler()), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].std()))
    sample(pipe, num_inference_steps=20)
    assert 0.8 < seen[0] < 1.2


# ---- errors ------------------------------------------------------------------------------------------------------

ERRORS = {
    "batch size 0": ({}, {"batch_size": 0}, "batch_size must be a positive integer"),
    "batch size text": ({}, {"batch_size": "2"}, "batch_size must be a positive integer"),
    "steps 0": ({}, {"num_inference_steps": 0}, "num_inference_steps must be a positive integer"),
    "steps 2.5": ({}, {"num_inference_steps": 2.5}, "num_inference_steps must be a positive integer"),
    "steps and timesteps": ({}, {"timesteps": [3.0]}, "either num_inference_steps or timesteps"),
    "increasing timesteps": ({}, {"num_inference_steps": None, "timesteps": [1.0, 2.0]}, "decreasing"),
    "timesteps out of range": ({}, {"num_inference_steps": None, "timesteps": [1200.0, 2.0]}, "must be within"),
    "more steps than T": ({"scheduler": LinearBetaScheduler}, {"num_inference_steps": 1001}, "at most"),
    "list of generators": ({}, {"generator": "one of two"}, "list of batch_size=2, got 1"),
    "decode": ({}, {"decode": "draw"}, "decode must be 'mode' or 'sample'"),
    "output type": ({}, {"output_type": "numpy"}, "output_type must be"),
    "tensor names": ({}, {"callback_on_step_end_tensor_inputs": ["latents", "eps_hat"]}, r"got \['eps_hat'\]"),
    "batch size true": ({}, {"batch_size": True}, "batch_size must be a positive integer, got True"),
    "batch size 2.0": ({}, {"batch_size": 2.0}, "batch_size must be a positive integer, got 2.0"),
    "batch size -1": ({}, {"batch_size": np.int64(-1)}, "batch_size must be a positive integer"),
    "steps true": ({}, {"num_inference_steps": True}, "num_inference_steps must be a positive integer, got True"),
    "steps 4.0": ({}, {"num_inference_steps": 4.0}, "num_inference_steps must be a positive integer, got 4.0"),
    "steps text": ({}, {"num_inference_steps": "4"}, "num_inference_steps must be a positive integer, got '4'"),
    "steps NaN": ({}, {"num_inference_steps": math.nan}, "num_inference_steps must be a positive integer"),
    "no timesteps": ({}, {"num_inference_steps": None, "timesteps": []}, "timesteps must be a decreasing list"),
    "one timestep": ({}, {"num_inference_steps": None, "timesteps": 9.0}, "timesteps must be a decreasing list"),
    "timesteps text": ({}, {"num_inference_steps": None, "timesteps": ["9", "1"]}, "timesteps must be a decreasing"),
    "timesteps true": ({}, {"num_inference_steps": None, "timesteps": [True, False]}, "timesteps must be a decreas"),
    "timesteps NaN": ({}, {"num_inference_steps": None, "timesteps": [math.nan]}, "timesteps must be a decreasing"),
    "timesteps 2d": (
        {},
        {"num_inference_steps": None, "timesteps": np.ones((2, 2))},
        "timesteps must be a decreasing",
    ),
    "timesteps not taken": (
        {"scheduler": DDIMScheduler},
        {"num_inference_steps": None, "timesteps": [9, 1]},
        "timesteps must be left out, because a DDIMScheduler does not support",
    ),
    "generator seed": ({}, {"generator": 0}, "generator must be a torch.Generator"),
    "generator of NumPy": ({}, {"generator": np.random.default_rng(0)}, "generator must be a torch.Generator"),
    "no generators": ({}, {"generator": []}, "list of batch_size=2, got 0"),
    "generators with none": ({}, {"generator": [None, None]}, "a list with None"),
    "generators with seeds": ({}, {"generator": (torch.Generator(), 1)}, "a list with 1"),
    "three generators": ({}, {"generator": (torch.Generator(),) * 3}, "list of batch_size=2, got 3"),
    "label 0.9": ({"num_class_embeds": 4}, {"class_labels": 0.9}, "class_labels must be a class index or a list"),
    "labels 0.9": (
        {"num_class_embeds": 4},
        {"class_labels": [0.9, 1]},
        "class_labels must be a class index or a list",
    ),
    "labels 1.0": ({"num_class_embeds": 4}, {"class_labels": torch.ones(2)}, "class_labels must be a class index or"),
    "label text": ({"num_class_embeds": 4}, {"class_labels": "1"}, "class_labels must be a class index or a list"),
    "label words": (
        {"num_class_embeds": 4},
        {"class_labels": ["1", "2"]},
        "class_labels must be a class index or a list",
    ),
    "label none": (
        {"num_class_embeds": 4},
        {"class_labels": [None, 1]},
        "class_labels must be a class index or a list",
    ),
    "label true": ({"num_class_embeds": 4}, {"class_labels": True}, "class_labels must be a class index or a list"),
    "labels true": (
        {"num_class_embeds": 4},
        {"class_labels": np.array([True, False])},
        "class_labels must be a class",
    ),
    "labels nested": (
        {"num_class_embeds": 4},
        {"class_labels": [[1, 2]]},
        "class_labels must be a class index or a list",
    ),
    "labels 2d": (
        {"num_class_embeds": 4},
        {"class_labels": torch.ones(1, 2).long()},
        "class_labels must be a class in",
    ),
    "labels empty": ({"num_class_embeds": 4}, {"class_labels": []}, "class_labels must be a class index or a list"),
    "labels of a dict": (
        {"num_class_embeds": 4},
        {"class_labels": {1: 2}},
        "class_labels must be a class index or a list",
    ),
    "one label in a list": ({"num_class_embeds": 4}, {"class_labels": [1]}, "one class or 2 of them, got 1"),
    "images of no prompt": ({}, {"num_images_per_prompt": 2}, "needs class_labels.*set batch_size=2"),
    "images 0": (
        {"num_class_embeds": 4},
        {"num_images_per_prompt": 0, "class_labels": 1},
        "num_images_per_prompt must",
    ),
    "images 1.5": ({}, {"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a positive integer"),
    "images and a batch": (
        {"num_class_embeds": 4},
        {"num_images_per_prompt": 3, "class_labels": [0, 1]},
        "got 2 with num_images_per_prompt=3, which makes 6 images; leave out batch_size=2",
    ),
    "images of one label and a batch": (
        {"num_class_embeds": 4},
        {"num_images_per_prompt": 3, "class_labels": 1},
        "which makes 3 images; leave out batch_size=2",
    ),
    "latents of integers": ({}, {"latents": torch.ones(2, 3, 8, 8).long()}, "floating-point torch.Tensor.*int64"),
    "latents of NumPy": ({}, {"latents": np.ones((2, 3, 8, 8))}, "floating-point torch.Tensor.*ndarray"),
    "complex latents": ({}, {"latents": torch.ones(2, 3, 8, 8) * 1j}, "floating-point torch.Tensor.*complex64"),
    "latents NaN": ({}, {"latents": torch.full((2, 3, 8, 8), math.nan)}, "latents must be finite"),
    "latents infinite": ({}, {"latents": torch.full((2, 3, 8, 8), math.inf)}, "latents must be finite"),
    "decode none": ({}, {"decode": None}, "decode must be 'mode' or 'sample', got None"),
    "decode list": ({}, {"decode": ["mode"]}, "decode must be 'mode' or 'sample'"),
    "output type none": ({}, {"output_type": None}, "output_type must be 'pil', 'np', 'pt' or 'latent', got None"),
    "return_dict": ({}, {"return_dict": "no"}, "return_dict must be True or False, got 'no'"),
    "callback": ({}, {"callback_on_step_end": 3}, "callback_on_step_end must be callable, got a int"),
    "tensor name alone": ({}, {"callback_on_step_end_tensor_inputs": "latents"}, "list of names among"),
    "tensor names of numbers": ({}, {"callback_on_step_end_tensor_inputs": [1]}, "list of names among"),
    "shape of latents": ({}, {"latents": torch.zeros(1, 3, 8, 8)}, r"latents must have shape \(2, 3, 8, 8\)"),
    "labels without classes": ({}, {"class_labels": 1}, "without classes"),
    "number of labels": ({"num_class_embeds": 4}, {"class_labels": [1, 2, 3]}, "one class or 2 of them"),
    "label too high": ({"num_class_embeds": 4}, {"class_labels": [1, 4]}, r"class_labels must be within \[0, 4\)"),
    "label above the null class": (
        {"num_class_embeds": 4, "null_class": True},
        {"class_labels": [1, 5]},
        r"class_labels must be within \[0, 5\), where 4 is the null class, got values from 1 to 5",
    ),
    "label too low": ({"num_class_embeds": 4}, {"class_labels": -1}, r"class_labels must be within \[0, 4\)"),
    "no labels": ({"num_class_embeds": 4}, {}, "class_labels must be given"),
    "no size": ({"sample_size": None}, {}, "sample_size must be set"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_refused_before_the_network_is_called(case):
    arguments, kwargs, message = ERRORS[case]
    scheduler = arguments.get("scheduler", VDMScheduler)()
    pipe = pipeline(scheduler, **{key: value for key, value in arguments.items() if key != "scheduler"})
    calls, source = [], seeded(7)
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    state = source.get_state()
    given = {"batch_size": 2, "generator": source, **kwargs}
    if given["generator"] == "one of two":
        given["generator"] = [source]
    with pytest.raises((ValueError, TypeError), match=message):
        sample(pipe, **given)
    assert not calls
    # after the error, the generator still gives the numbers of its seed
    assert torch.equal(source.get_state(), state)


def test_every_argument_is_typed():
    # `from_pipe` drops components whose annotation it cannot read
    for name in ("unet", "scheduler", "noise_schedule", "text_encoder", "tokenizer"):
        assert name in VDMPipeline._get_signature_types()
    assert VDMPipeline._optional_components == ["noise_schedule", "text_encoder", "tokenizer"]
