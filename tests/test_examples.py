"""The self-contained examples as a new user runs them: as commands with small sizes, and what they print."""

import ast
import importlib
import importlib.metadata
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_vdm
from diffusers_vdm import FixedLinearGamma, VDMPipeline, VDMScheduler
from tests.models import tiny_preset
from tests.paths import EXAMPLES
from tests.pictures import picture
from tests.running import run_example

NAMES = ("toy_2d", "train_minimal", "likelihood_of_a_diffusers_checkpoint", "own_noise_schedule",
         "edit_images", "upscale_images")  # fmt: skip
MAX_LINES = 120


def run(name, *arguments, **more):
    """What an example prints to the standard output."""
    return run_example(f"{name}.py", *arguments, **more).stdout


def numbers(line):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+(?:e[-+]\d+)?", line)]


def size_of(path):
    with Image.open(path) as image:
        return image.size


def line_of(output, start):
    found = [line for line in output.splitlines() if line.startswith(start)]
    assert len(found) == 1, (start, output)
    return found[0]


# ---- all examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_what_it_shows_how_and_for_how_long(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    head = ast.get_docstring(ast.parse(source))
    assert re.search(rf"^    (python|accelerate launch) examples/{name}\.py", head, flags=re.MULTILINE)
    assert re.search(r"second|minute", head) and "prints" in head
    assert len(re.findall(r"^    .*\d\.\d+", head, flags=re.MULTILINE)) >= 3, "a sample of its output"


def imported(tree):
    """(module, name or None) of every import of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a file by itself imports nothing relative"
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_imports_the_package_and_its_libraries_alone(name):
    requirements = importlib.metadata.requires("diffusers-vdm")
    libraries = {re.match(r"[\w-]+", r)[0].lower() for r in requirements if "test" not in r.partition(";")[2]}
    libraries = {{"scikit-learn": "sklearn", "pillow": "PIL"}.get(library, library) for library in libraries}
    assert {"torch", "diffusers", "accelerate", "matplotlib"} <= libraries
    for module, what in imported(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))):
        root = module.split(".")[0]
        if root == "diffusers_vdm":  # from its top: names of __init__, or the two public modules of equations
            assert module == root and what in {*diffusers_vdm.__all__, "diffusion", "ode"}, (module, what)
        else:
            assert root in libraries or root in sys.stdlib_module_names or module == name, module


@pytest.mark.parametrize("name", NAMES)
def test_an_example_uses_no_private_name(name):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [what or module for module, what in imported(tree)]
    assert [n for n in names if n.startswith("_") and n != "__init__"] == []


# ---- each example ------------------------------------------------------------------------------------------------


def test_the_density_of_a_mixture_is_estimated_about_right_after_a_few_seconds(tmp_path):
    output = run("toy_2d", "--train_steps", 1000, "--points", 300, "--output", tmp_path / "toy.png")
    exact, ode, bound, error = numbers(line_of(output, "mean of 300 held-out points"))
    # without training it is off by 0.7 nats
    assert abs(ode - exact) < 0.2 and abs(bound - exact) < 0.25
    assert 0 < error < 0.05
    assert numbers(line_of(output, "The ODE's mean"))[0] == pytest.approx(ode - exact, abs=0.0011)
    assert size_of(tmp_path / "toy.png") == (1200, 400)


@pytest.mark.slow
def test_the_density_of_a_mixture_comes_within_the_tolerance_that_is_promised(tmp_path):
    output = run("toy_2d", "--output", tmp_path / "toy.png")
    exact, ode, bound, error = numbers(line_of(output, "mean of 2000 held-out points"))
    assert abs(ode - exact) < 0.05
    assert -4 * error < bound - exact < 0.08


def test_the_exact_density_of_the_mixture_is_one():
    sys.path.insert(0, str(EXAMPLES))
    import toy_2d

    axis = torch.linspace(-5, 5, 501)
    mass = (-toy_2d.exact_nats(torch.cartesian_prod(axis, axis))).exp().sum() * 0.02**2
    assert float(mass) == pytest.approx(1, abs=1e-5)
    x = toy_2d.draw_data(50_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), toy_2d.WEIGHTS @ toy_2d.MEANS, atol=0.03, rtol=0)


def test_the_minimal_loop_learns_and_leaves_a_pipeline(tmp_path):
    options = "--train_steps 20 --batch_size 16 --eval_samples 2 --num_inference_steps 3".split()
    output = run("train_minimal", *options, "--output_dir", tmp_path)
    assert numbers(line_of(output, "step 20:"))[0] > 0
    bpd, error = numbers(line_of(output, "297 held-out images:"))
    assert 1.5 < bpd < 5.5 and 0 < error < 0.5  # 6.69 after a single step
    pipe = VDMPipeline.from_pretrained(tmp_path)
    assert pipe(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].size == (8, 8)
    assert size_of(tmp_path / "samples.png") == (512, 512)


@pytest.mark.slow
def test_the_minimal_loop_runs_on_two_processes(tmp_path):
    options = "--train_steps 20 --batch_size 8 --eval_samples 2 --num_inference_steps 3".split()
    output = run("train_minimal", *options, "--output_dir", tmp_path, processes=2)
    assert 1.5 < numbers(line_of(output, "297 held-out images:"))[0] < 5.5
    line_of(output, "saved the pipeline")  # once, not by each process


def test_a_checkpoint_is_measured_in_both_ways_and_random_weights_are_named(tmp_path):
    output = run("likelihood_of_a_diffusers_checkpoint", "--max_images", 2, "--tolerance", 1e-2)
    assert "the weights are random, and the numbers below mean nothing" in output
    assert "2 images of (3, 16, 16)" in output
    bound, _ = numbers(line_of(output, "variational bound, T = 50"))
    parts = numbers(line_of(output, "  prior"))
    assert bound == pytest.approx(sum(parts), abs=0.01)
    assert numbers(line_of(output, "probability-flow ODE"))[0] > 1


def test_a_checkpoint_of_a_folder_is_measured_on_the_images_of_a_folder(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from diffusers_vdm import evaluate_vlb

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=2, add_attention=False, **blocks)
    scheduler = DDPMScheduler(num_train_timesteps=20, beta_end=0.5, prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    images = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "images" / f"{i}.png")
    arguments = ("--model", tmp_path / "model", "--image_dir", tmp_path / "images", "--tolerance", 1e-2)
    output = run("likelihood_of_a_diffusers_checkpoint", *arguments)
    assert "random" not in output and "resized" not in output and "3 images of (1, 8, 8)" in output
    expected = evaluate_vlb(unet, scheduler, images, progress_bar=False)
    assert numbers(line_of(output, "variational bound, T = 20"))[0] == pytest.approx(expected.bpd, abs=0.001)


def test_a_custom_schedule_is_trained_saved_and_loaded(tmp_path):
    output = run("own_noise_schedule", "--train_steps", 10, "--output_dir", tmp_path, new_process=True)
    began, trained, loaded = (numbers(line_of(output, f"γ(t) {word}")) for word in ("when", "trained", "loaded"))
    assert began != trained and trained == loaded
    assert trained[0] == -7.5 and trained[-1] == 5.0 and trained == sorted(trained)
    assert numbers(line_of(output, "largest difference of the loaded schedule:")) == [0.0]
    assert numbers(line_of(output, "largest difference of the loaded scheduler"))[0] < 1e-6
    # without the file of the class, the scheduler alone has γ(t)
    scheduler = VDMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert float(scheduler.noise_schedule()(0.4)) == pytest.approx(trained[2], abs=0.001)
    with pytest.raises(ValueError, match="own_noise_schedule"):
        VDMPipeline.from_pretrained(tmp_path)
    assert VDMPipeline.from_pretrained(tmp_path, noise_schedule=None).noise_schedule is None


@pytest.mark.parametrize("seed", range(5))
def test_the_custom_schedule_increases_for_any_parameters(seed, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    PowersGamma = importlib.import_module("own_noise_schedule").PowersGamma
    # another test loads a pipeline where this module was not imported
    del sys.modules["own_noise_schedule"]

    schedule = PowersGamma(gamma_min=-9.0, gamma_max=4.0)
    torch.nn.init.normal_(schedule.logits, std=3.0, generator=torch.Generator().manual_seed(seed))
    t = torch.linspace(0, 1, 501, dtype=torch.float64, requires_grad=True)
    gamma, slope = schedule.gamma_and_slope(t)
    assert gamma.dtype == torch.float64 and bool((gamma.diff() > 0).all()) and bool((slope > 0).all())
    ends = gamma.detach()[[0, -1]].tolist()
    assert ends[0] == -9.0 and ends[1] == pytest.approx(4.0, abs=1e-12)  # a T-step bound needs γ(0) to the bit
    torch.testing.assert_close(slope, torch.autograd.grad(gamma.sum(), t)[0])


# ---- edit_images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 10])
def test_images_are_edited_with_and_without_classes(tmp_path, classes):
    arguments = {} if classes is None else {"num_class_embeds": classes, "null_class": True}
    schedule = FixedLinearGamma(-9.0, 4.0)
    pipe = VDMPipeline(tiny_preset(**arguments), VDMScheduler.from_noise_schedule(schedule), num_levels=17)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.02)  # so that the ODE is smooth
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "edits"
    printed = run("edit_images", "--model", tmp_path / "model", "--output_dir", out, "--num_inference_steps", "4")
    names = {path.name for path in out.iterdir()}
    expected = {"strength.png", "inpainting.png", "interpolation.png"} | ({"classes.png"} if classes else set())
    assert names == expected and all(min(size_of(out / name)) > 8 for name in names)
    assert numbers(line_of(printed, "inpainting.png")) == [0.0]
    assert numbers(line_of(printed, "interpolation.png")) == [0.0]
    assert (out / "strength.png").stat().st_size > 500


@pytest.mark.parametrize("sizes", [[(8, 8)], [(8, 8), (9, 8)], [(9, 9), (9, 9)]])
def test_images_that_a_model_cannot_edit_are_an_error_in_one_line(tmp_path, sizes):
    pipe = VDMPipeline(tiny_preset(), VDMScheduler.from_noise_schedule(FixedLinearGamma(-9.0, 4.0)), num_levels=17)
    pipe.save_pretrained(tmp_path / "model")
    files = []
    for i, size in enumerate(sizes):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", size).save(files[-1])
    done = run_example("edit_images.py", "--model", tmp_path / "model", "--images", *files, check=False)
    assert done.returncode == 2 and "two or more files of 8×8 pixels" in done.stderr and "Traceback" not in done.stderr


# ---- upscale_images --------------------------------------------------------------------------------


def test_images_are_enlarged_and_compared(tmp_path):
    schedule = FixedLinearGamma(-9.0, 4.0)
    pipe = VDMPipeline(tiny_preset(cond_channels=1), VDMScheduler.from_noise_schedule(schedule), num_levels=17)
    pipe.save_pretrained(tmp_path / "model")
    arguments = ["--num_images", 3, "--num_inference_steps", 2, "--output", tmp_path / "up.png"]
    printed = run("upscale_images", "--model", tmp_path / "model", *arguments)
    assert size_of(tmp_path / "up.png") == (3 * 48, 4 * 48)
    values = [numbers(line)[-1] for line in printed.splitlines()]
    assert len(values) == 4 and all(0 < value < 1 for value in values)
    VDMPipeline(tiny_preset(), pipe.scheduler, num_levels=17).save_pretrained(tmp_path / "other")
    done = run_example("upscale_images.py", "--model", tmp_path / "other", check=False)
    assert done.returncode == 1 and "trained by --upscale_factor" in done.stderr


def test_files_are_enlarged(tmp_path):
    unet = tiny_preset("cifar10", sample_size=16, cond_channels=3)
    pipe = VDMPipeline(unet, VDMScheduler.from_noise_schedule(FixedLinearGamma(-9.0, 4.0)))
    pipe.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    files = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, size in zip(files, ((40, 30), (16, 16)), strict=True):
        picture(rng, size).save(path)
    common = ["--model", tmp_path / "model", "--num_inference_steps", 2, "--output", tmp_path / "up.png"]
    printed = run("upscale_images", *common, "--images", *files, "--upscale_factor", 4)
    assert size_of(tmp_path / "up.png") == (2 * 48, 4 * 48) and len(printed.splitlines()) == 4
    picture(rng, (20, 20), "L").convert("I;16").save(tmp_path / "deep.png")
    for more, message in (
        ([], "--images must be given"),
        (["--images", *files, "--upscale_factor", 3], "must divide"),
        (["--images", tmp_path / "none.png"], "none.png"),
        (["--images", tmp_path], "directory"),
        (["--images", tmp_path / "deep.png"], "--images must have 8 bits"),
        (["--images", *files, "--output", files[0]], "--output must not be one of --images"),
        (["--images", *files, "--output", tmp_path / "no" / "up.png"], "--output must name a .png file"),
    ):
        done = run_example("upscale_images.py", *common, *more, check=False)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    done = run_example("upscale_images.py", *common, "--num_images", 298, check=False)
    assert done.returncode == 2 and "--num_images must be within [1, 297], got 298" in done.stderr
