"""Draw images from a saved model.

    python examples/sample.py --model runs/digits
    python examples/sample.py --model user/vdm-cifar10 --num_images 16 --num_inference_steps 1000 --device cuda
    python examples/sample.py --model runs/digits --sampler dpmsolver++ --num_inference_steps 20
    python examples/sample.py --model runs/digits --sampler UniPCMultistepScheduler --num_inference_steps 20
    python examples/sample.py --model runs/digits --sampler ode --rtol 1e-3         # adaptive steps
    python examples/sample.py --model runs/classes --class_labels 0 1 2 --guidance_scale 2

Writes a grid of the images (with --images_dir also each one as a PNG), and prints a small table. The noise of an image
is a function of (seed, index), so it does not depend on the number of images or on the batch size.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from ..console import errors_in_one_line, tolerate_any_encoding


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved pipeline, or repository on the Hub")
    parser.add_argument("--output", default="samples.png", help="file of the grid (default: samples.png)")
    parser.add_argument("--images_dir", help="also write every image into this folder")
    parser.add_argument("--num_images", type=int, default=64, help="default: 64")
    parser.add_argument("--batch_size", type=int, default=64, help="images drawn at once (default: 64)")
    parser.add_argument("--num_inference_steps", type=int, default=250, help="default: 250")
    parser.add_argument(
        "--best_timesteps", action="store_true", help="the best timesteps for this number, by the model's calibration"
    )
    parser.add_argument(
        "--variance", choices=("posterior", "optimal"), help="of an ancestral step (default: the model's)"
    )
    parser.add_argument(
        "--sampler",
        help="ancestral, ddim, dpmsolver++, ode (adaptive), or the name of one of diffusers (default: the model's)",
    )
    parser.add_argument("--rtol", type=float, default=1e-3, help="tolerance of --sampler ode (default: 1e-3)")
    parser.add_argument("--prompt", nargs="+", help="texts, repeated for all images, for a model of texts")
    parser.add_argument("--negative_prompt", help="text to guide away from, instead of the empty one")
    parser.add_argument("--cond_vectors", type=float, nargs="+", help="a vector for all images")
    parser.add_argument("--image", help="image file for all images, for a model that is conditioned on images")
    parser.add_argument("--class_labels", type=int, nargs="+", help="classes, repeated for all images")
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, help="1 is the model, 0 the model without classes (default: 1)"
    )
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="values of γ with guidance"
    )
    parser.add_argument("--autoguidance", help="weaker model to guide away from: a folder or repository, as --model")
    parser.add_argument(
        "--decode", choices=("mode", "sample"), default="mode", help="mode of p(x | z_0), or a sample (default: mode)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the network"
    )
    options = parser.parse_args(arguments)
    for name in ("num_images", "batch_size", "num_inference_steps", "rtol"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    if min(options.class_labels or [0]) < 0:
        parser.error(f"--class_labels must be class indices, starting at 0, got {options.class_labels}")
    from PIL import Image  # old versions import NumPy, which --help must not wait for

    # before the images are drawn
    known, suffix = Image.registered_extensions(), Path(options.output).suffix.lower()
    if known.get(suffix) not in Image.SAVE or Path(options.output).is_dir():
        parser.error(f"--output must name an image file, such as samples.png, got {options.output}")
    if options.images_dir and any(
        path.is_file() for path in (Path(options.images_dir), *Path(options.images_dir).parents)
    ):
        parser.error(f"--images_dir must be an existing or new folder, got {options.images_dir}")
    return options


def choose_device(name: str | None):
    """The device with this name; raises `ValueError` if it is not available."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be available, such as cpu or cuda:0, got {name!r} ({reason})") from error
    return device


def as_ours(scheduler):
    """Returns our schedulers unchanged; converts one of diffusers to ours, with the same levels."""
    from .. import VDMScheduler

    return scheduler if hasattr(scheduler, "noise_schedule") else VDMScheduler.from_diffusers(scheduler)


def choose_scheduler(scheduler, sampler: str):
    """The scheduler for a sampler by name, with the levels of `scheduler`."""
    import diffusers

    scheduler = as_ours(scheduler)
    if sampler in ("ancestral", "ddim", "dpmsolver++"):
        return type(scheduler).from_config(scheduler.config, algorithm=sampler)
    chosen = getattr(diffusers, sampler, None)
    if chosen is None:
        raise ValueError(f"--sampler must be ancestral, ddim, dpmsolver++, ode or a class of diffusers, got {sampler}")
    return scheduler.to_diffusers(chosen)


def with_variance(scheduler, variance: str):
    """One of our schedulers with another variance of its ancestral steps; raises `ValueError` for others."""
    from ..gamma_scheduler import GammaScheduler

    if not isinstance(scheduler, GammaScheduler):
        raise ValueError(f"--variance needs the ancestral sampler, got a {type(scheduler).__name__}")
    if scheduler.config.algorithm != "ancestral":
        raise ValueError(f"--variance needs the ancestral sampler, got {scheduler.config.algorithm}")
    return type(scheduler).from_config(scheduler.config, variance=variance)


def conditions_of_images(pipe, own: dict[str, Any], shared: dict[str, Any], count: int) -> dict[str, Any]:
    """The conditions of `count` images as tensors on the device of the pipeline.

    Args:
        pipe ([`VDMPipeline`]): the pipeline.
        own (`dict`): `class_labels` and `prompt` of each image.
        shared (`dict`): `cond_vectors` and `image` of all images.
    """
    from ..condition_arguments import batch_of_conditions, conditions_of_call, prompt_conditions
    from ..texts import NULL_TEXT

    prompt = own.get("prompt")
    if prompt is None and pipe.text_encoder is not None:
        prompt = NULL_TEXT
    texts = prompt_conditions(pipe.text_encoder, pipe.tokenizer, "prompt", prompt)
    arguments = {name: value for name, value in {**own, **shared}.items() if name != "prompt"}
    given, single = conditions_of_call(pipe.unet, pipe.config.num_levels, texts=texts, **arguments)
    _, conditions = batch_of_conditions(pipe.unet, count, 1, given, single)
    return {name: value.to(pipe.device) for name, value in conditions.items()}


def solve_ode(pipe, network, generators: list, conditions: dict[str, Any], rtol: float, decode: str):
    """Samples by the probability-flow ODE, with adaptive steps for each image: `(B, C, H, W)` in [0, 1]."""
    import torch

    from .. import diffusion, ode

    z = torch.stack([torch.randn(pipe.image_shape, generator=each) for each in generators]).to(pipe.device)
    scheduler = as_ours(pipe.scheduler)
    schedule = scheduler.noise_schedule()
    known = {"prediction_type": scheduler.config.prediction_type, **conditions}
    z_0 = ode.sample(network, schedule, z, rtol=rtol, atol=rtol, **known).z
    gamma_0, levels = schedule.ends()[0].detach().cpu(), pipe.config.num_levels
    return diffusion.decode(z_0, gamma_0, levels, draw=decode == "sample", generator=generators).float() / (levels - 1)


def sample(options: argparse.Namespace) -> None:
    """Draws the images, writes them, and prints the table."""
    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from .. import VDMPipeline
    from ..condition_arguments import prompt_conditions
    from ..guidance import guided_network
    from ..plots import image_grid
    from ..randomness import keyed_generator
    from ..texts import NULL_TEXT
    from ..training.metrics import last_evaluation, read_steps

    device = choose_device(options.device)
    pipe = VDMPipeline.from_pretrained(options.model).to(device)
    pipe.unet.to(getattr(torch, options.dtype))
    pipe.set_progress_bar_config(leave=False)
    if options.sampler not in (None, "ode"):
        pipe.scheduler = choose_scheduler(pipe.scheduler, options.sampler)
    if options.variance is not None:
        pipe.scheduler = with_variance(pipe.scheduler, options.variance)
    if options.prompt and pipe.unet.config.get("cross_attention_dim") is None:
        raise ValueError("--prompt needs a model of texts, and this one takes none")
    rows = range(options.num_images)
    each = {
        name: [given[i % len(given)] for i in rows]
        for name, given in (("class_labels", options.class_labels), ("prompt", options.prompt))
        if given
    }
    shared: dict[str, Any] = {} if options.cond_vectors is None else {"cond_vectors": options.cond_vectors}
    if options.image is not None:
        channels = pipe.unet.config.get("cond_channels")
        shared["image"] = Image.open(options.image).convert("L" if channels == 1 else "RGB")
    conditions = conditions_of_images(pipe, {name: given[:1] for name, given in each.items()}, shared, 1)

    weak = None
    if options.autoguidance is not None:
        weak = VDMPipeline.from_pretrained(options.autoguidance).to(device).unet.to(getattr(torch, options.dtype))
    guidance = {
        "guidance_scale": options.guidance_scale, "guidance_interval": options.guidance_interval, "autoguidance": weak
    }  # fmt: skip
    texts = {}
    if "encoder_hidden_states" in conditions and (options.guidance_scale != 1 or options.negative_prompt is not None):
        negative = options.negative_prompt or NULL_TEXT
        texts = prompt_conditions(pipe.text_encoder, pipe.tokenizer, "negative_prompt", negative)
    network = guided_network(pipe.unet, pipe.scheduler, conditions, **guidance, negative_conditions=texts)
    if options.negative_prompt is not None:
        guidance["negative_prompt"] = options.negative_prompt

    start, images = time.perf_counter(), []
    batches = range(0, options.num_images, options.batch_size)
    for first in tqdm(batches, desc="batches", disable=len(batches) == 1):
        index = range(first, min(first + options.batch_size, options.num_images))
        generators = [keyed_generator(options.seed, "sample", i) for i in index]
        own = {name: given[index.start : index.stop] for name, given in each.items()}
        if options.sampler == "ode":
            conditions = conditions_of_images(pipe, own, shared, len(index))
            images.append(solve_ode(pipe, network, generators, conditions, options.rtol, options.decode).cpu())
            continue
        arguments = {"decode": options.decode, "output_type": "pt"}
        if options.best_timesteps:
            arguments["timesteps"] = "best"
        arguments |= own | shared | guidance
        output: Any = pipe(len(index), options.num_inference_steps, generators, **arguments)
        images.append(output.images.cpu())
    images = torch.cat(images)
    seconds = time.perf_counter() - start

    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    image_grid(images).save(options.output)
    if options.images_dir:
        folder = Path(options.images_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(pipe.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())):
            image.save(folder / f"{i:05d}.png")

    steps = f"{options.num_inference_steps} steps" if options.sampler != "ode" else f"ODE, rtol {options.rtol}"
    table = [
        ("images", f"{len(images)} of {tuple(images.shape[1:])}, {pipe.config.num_levels} levels"),
        ("sampler", f"{type(pipe.scheduler).__name__}, {steps}, seed {options.seed}"),
        *([("guidance", f"scale {options.guidance_scale:g}")] if network is not pipe.unet else []),
        ("time", f"{seconds:.1f} s on {device}, {len(images) / seconds:.2f} images/s"),
        ("pixel mean ± std", f"{images.mean():.3f} ± {images.std():.3f} of [0, 1]"),
    ]
    measured = last_evaluation(read_steps(options.model))
    if measured is not None:
        step, evaluation = measured
        error = f" ± {evaluation.stderr_bpd:.4f}" if evaluation.stderr_bpd else ""
        table.append(("held-out bits/dim", f"{evaluation.bpd:.4f}{error} at step {step}"))
    table.append(("written", options.output))
    for name, value in table:
        print(f"  {name:<20}{value}")


def main(arguments: list[str] | None = None) -> None:
    """Samples for the command line, or `arguments`; exits with an error message of one line."""
    tolerate_any_encoding()
    options = parse_options(arguments)
    with errors_in_one_line("sample.py", ValueError, TypeError, OSError, RuntimeError):
        sample(options)


if __name__ == "__main__":
    main()
