"""Enlarge images, by default held-out digits, by a model of `train.py --upscale_factor`, and measure how well it does.

    diffusers-vdm train --upscale_factor 2 --output_dir runs/upscaling
    python examples/upscale_images.py --model runs/upscaling

writes upscaled.png, with a row each of digits, the same at half the size, and two samples for each, and prints, in
about ten seconds on one CPU core, mean differences of pixels in [0, 1]:

    samples, made small again, to what they were drawn for   0.015
    samples to the originals                                 0.074
    samples to each other                                    0.071
    repeated pixels, without a model, to the originals       0.153

The first number would be 0 for a model without errors. The second and the third are about the same for samples of
p(image | small image). With --images, it does the same for image files of 8 bits, which are resized and cropped to the
size of the model.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from diffusers_vdm import VDMPipeline, diffusion


def digits(count: int) -> torch.Tensor:
    """The levels of digits that train.py does not train on, 0 to 16."""
    order = np.random.default_rng(0).permutation(1797)[1500:]
    return torch.from_numpy(load_digits().images[order[:count]]).long()[:, None]


def of_files(paths: list[str], shape: tuple[int, int, int], num_levels: int) -> torch.Tensor:
    """The levels of image files, resized and cropped to the size of the model."""
    arrays = []
    for path in paths:
        with Image.open(path) as image:
            if image.mode not in ("L", "RGB", "RGBA", "P", "1"):
                raise ValueError(f"--images must have 8 bits, got {path} of mode {image.mode}")
            pixels = ImageOps.fit(image.convert("L" if shape[0] == 1 else "RGB"), shape[:0:-1])
        arrays.append(np.array(pixels, dtype=np.int64).reshape(*shape[1:], -1) * num_levels // 256)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def enlarge(args: argparse.Namespace) -> None:
    if Path(args.output).suffix != ".png" or not Path(args.output).absolute().parent.is_dir():
        raise ValueError(f"--output must name a .png file in an existing folder, got {args.output}")
    if any(Path(path).resolve() == Path(args.output).resolve() for path in args.images or []):
        raise ValueError(f"--output must not be one of --images, got {args.output}")
    pipe = VDMPipeline.from_pretrained(args.model)
    shape, num_levels = pipe.image_shape, pipe.config.num_levels
    options = Path(args.model) / "options.json"  # of train.py
    trained = json.loads(options.read_text())["options"].get("upscale_factor") if options.is_file() else None
    factor = args.upscale_factor or trained or 2
    if pipe.unet.config.get("cond_channels") != shape[0] or trained not in (None, factor):
        raise ValueError(f"--model must have been trained by --upscale_factor {factor}, got {args.model}")
    if args.images is None and shape != (1, 8, 8):
        raise ValueError(f"--images must be given for a model of other images than the digits, got {args.model}")
    levels = digits(args.num_images) if args.images is None else of_files(args.images, shape, num_levels)
    images, small = (x.float() / (num_levels - 1) for x in (levels, diffusion.low_resolution(levels, factor)))
    generator = torch.Generator().manual_seed(0)
    draw = {"image": small, "num_inference_steps": args.num_inference_steps, "output_type": "pt"}
    first, second = (pipe(generator=generator, **draw).images for _ in range(2))

    enlarged = small.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    pictures = pipe.numpy_to_pil(torch.cat([images, enlarged, first, second]).permute(0, 2, 3, 1).numpy())
    pictures = [ImageOps.scale(picture, -(-48 // shape[1]), Image.Resampling.NEAREST) for picture in pictures]
    make_image_grid(pictures, rows=4, cols=len(images)).save(args.output)
    for name, value in (
        (
            "samples, made small again, to what they were drawn for",
            difference(torch.nn.functional.avg_pool2d(first, factor), small),
        ),
        ("samples to the originals", difference(first, images)),
        ("samples to each other", difference(first, second)),
        ("repeated pixels, without a model, to the originals", difference(enlarged, images)),
    ):
        print(f"{name:<55}  {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repository of a VDMPipeline")
    parser.add_argument("--images", nargs="+", help="image files instead of digits")
    parser.add_argument("--upscale_factor", type=int, help="that of the training, read from its options if not given")
    parser.add_argument("--num_images", type=int, default=12, help="digits, 1 to 297")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--output", default="upscaled.png", help="PNG file to write")
    args = parser.parse_args()
    if not 1 <= args.num_images <= 297:
        parser.error(f"--num_images must be within [1, 297], got {args.num_images}")
    try:
        enlarge(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"upscale_images.py: {error}") from error


if __name__ == "__main__":
    main()
