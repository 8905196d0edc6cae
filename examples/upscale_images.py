"""Enlarge images, by default held-out digits, by a model of `train.py --upscale_factor`, and measure how well it does.

    diffusers-vdm train --upscale_factor 2 --output_dir runs/upscaling
    python examples/upscale_images.py --model runs/upscaling

writes upscaled.png, with a row each of digits, the same at half the size, and two samples for each, and prints, in
about ten seconds on one CPU core, mean differences of pixels in [0, 1]:

    samples, made small again, to what they were drawn for   0.014
    samples to the originals                                 0.075
    samples to each other                                    0.071
    repeated pixels, without a model, to the originals       0.153

The first number would be 0 for a model without errors. The second and the third are about the same for samples of
p(image | small image). With --images, it does the same for image files, which are cropped to the size of the model.
"""

import argparse

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from diffusers_vdm import VDMPipeline


def digits(count: int) -> torch.Tensor:
    """Digits that train.py does not train on, in [0, 1]."""
    order = np.random.default_rng(0).permutation(1797)[1500:]
    return torch.from_numpy(load_digits().images[order[:count]]).float()[:, None] / 16


def of_files(paths: list[str], shape: tuple[int, int, int]) -> torch.Tensor:
    """The images of some files in [0, 1], cropped to the size of the model."""
    mode = "L" if shape[0] == 1 else "RGB"
    images = [ImageOps.fit(Image.open(path).convert(mode), shape[:0:-1]) for path in paths]
    arrays = [np.array(image, dtype=np.float32).reshape(*image.size[::-1], -1) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def made_small(images: torch.Tensor, factor: int) -> torch.Tensor:
    """The mean of each square of pixels, of images in [0, 1]."""
    return torch.nn.functional.avg_pool2d(images, factor)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repository of a VDMPipeline")
    parser.add_argument("--images", nargs="+", help="image files instead of digits")
    parser.add_argument("--upscale_factor", type=int, default=2, help="that of the training")
    parser.add_argument("--num_images", type=int, default=12, help="digits to enlarge")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--output", default="upscaled.png")
    args = parser.parse_args()

    pipe = VDMPipeline.from_pretrained(args.model)
    shape, factor, levels = pipe.image_shape, args.upscale_factor, pipe.config.num_levels - 1
    if pipe.unet.config.get("cond_channels") != shape[0]:
        parser.error(f"--model must have been trained by --upscale_factor, got {args.model}")
    if args.images is None and shape != (1, 8, 8):
        parser.error(f"--images must be given for a model of other images than the digits, got {args.model}")
    if factor < 2 or shape[1] % factor or shape[2] % factor:
        parser.error(f"--upscale_factor must divide {shape[1]} and {shape[2]}, got {factor}")
    images = digits(args.num_images) if args.images is None else of_files(args.images, shape)
    small = (made_small(images, factor) * levels).round() / levels
    generator = torch.Generator().manual_seed(0)
    draw = {"image": small, "num_inference_steps": args.num_inference_steps, "output_type": "pt"}
    first, second = (pipe(generator=generator, **draw).images for _ in range(2))

    enlarged = small.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    pictures = pipe.numpy_to_pil(torch.cat([images, enlarged, first, second]).permute(0, 2, 3, 1).numpy())
    pictures = [ImageOps.scale(picture, -(-48 // shape[1]), Image.Resampling.NEAREST) for picture in pictures]
    make_image_grid(pictures, rows=4, cols=len(images)).save(args.output)
    for name, value in (
        ("samples, made small again, to what they were drawn for", difference(made_small(first, factor), small)),
        ("samples to the originals", difference(first, images)),
        ("samples to each other", difference(first, second)),
        ("repeated pixels, without a model, to the originals", difference(enlarged, images)),
    ):
        print(f"{name:<55}  {value:.3f}")


if __name__ == "__main__":
    main()
