"""Edit held-out digits with a trained model: classes with guidance, a start in the middle, inpainting, interpolation.

    diffusers-vdm train --class_conditional --output_dir runs/classes
    python examples/edit_images.py --model runs/classes

writes four pictures into `edits/`, and prints, in about two minutes on one CPU core:

    classes.png        one class per column, guidance_scale 0, 1, 2, 4 per row
    strength.png       an image, then four samples each with strength 0.3, 0.6, 0.9
    inpainting.png     images, masked images, and two samples each; mean change of known pixels 0.0000
    interpolation.png  from one image to another by the ODE; largest error of both ends 0.0000

Without classes, everything but classes.png is made. For a model of other images, name at least two files of its size
by `--images`; the default are digits that no run of train.py has seen.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_vdm import VDMPipeline

SCALES, STRENGTHS = (0.0, 1.0, 2.0, 4.0), (0.3, 0.6, 0.9)


def held_out_digits() -> torch.Tensor:
    """The first ten of the 297 digits that train.py does not train on, in [0, 1]."""
    order = np.random.default_rng(0).permutation(1797)
    return torch.from_numpy(load_digits().images[order[1500:1510]]).float()[:, None] / 16


def generators(count: int, seed: int) -> list[torch.Generator]:
    """One for each image, so that rows of a picture differ by what they show and not by their noise."""
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def classes(pipe: VDMPipeline, steps: int) -> torch.Tensor:
    """Samples of the first ten classes at each scale; at scale 0 the class has no effect."""
    labels = list(range(min(10, pipe.unet.config.num_class_embeds)))
    common = {"num_inference_steps": steps, "class_labels": labels, "output_type": "pt"}
    rows = [pipe(**common, guidance_scale=scale, generator=generators(len(labels), 0)).images for scale in SCALES]
    return torch.cat(rows)


def strengths(pipe: VDMPipeline, image: torch.Tensor, steps: int) -> torch.Tensor:
    """The image, and four samples for each strength, in rows of five."""
    rows = []
    for strength in STRENGTHS:
        common = {"num_inference_steps": steps, "strength": strength, "output_type": "pt"}
        rows += [image, pipe(4, image=image, generator=generators(4, 1), **common).images]
    return torch.cat(rows)


def inpaint(pipe: VDMPipeline, images: torch.Tensor, steps: int) -> tuple[torch.Tensor, float]:
    """Columns of images, masked ones and two samples, and the mean change of the pixels that are known."""
    mask = torch.zeros(1, 1, *images.shape[2:])
    mask[..., images.shape[2] // 2 :, :] = 1  # the lower half is repainted
    common = {"num_inference_steps": steps, "image": images, "mask_image": mask, "num_resamples": 5}
    rows = [images, images * (1 - mask) + 0.5 * mask]
    rows += [pipe(**common, output_type="pt", generator=generators(len(images), seed)).images for seed in (2, 3)]
    change = ((rows[2] - images) * (1 - mask)).abs().mean()
    return torch.cat(rows), float(change)


def interpolate(pipe: VDMPipeline, images: torch.Tensor, label: int | None) -> tuple[torch.Tensor, float]:
    """Ten images on a great circle, and the largest error of its ends, in [0, 1]."""
    common = {"generator": torch.Generator().manual_seed(4), "output_type": "pt", "class_labels": label}
    found = pipe.interpolate(images, 10, **common)
    return found, float((found[[0, -1]] - images).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repository of a VDMPipeline")
    parser.add_argument("--images", nargs="+", help="files of the images to edit")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--output_dir", type=Path, default=Path("edits"))
    args = parser.parse_args()

    pipe = VDMPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(leave=False)
    processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False, do_resize=False)
    channels, *size = pipe.image_shape
    files = [Image.open(path).convert("L" if channels == 1 else "RGB") for path in args.images or ()]
    images = processor.preprocess(files) if len({file.size for file in files}) == 1 else held_out_digits()
    if (args.images and len(files) != len(images)) or len(images) < 2 or [*images.shape[2:]] != size:
        parser.error(f"--images must be two or more files of {size[1]}×{size[0]} pixels for this model")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def write(name: str, pictures: torch.Tensor, columns: int, text: str) -> None:
        scale = max(1, 64 // size[1])
        each = [picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
                for picture in pipe.numpy_to_pil(pictures.permute(0, 2, 3, 1).numpy())]  # fmt: skip
        make_image_grid(each, rows=len(each) // columns, cols=columns).save(args.output_dir / name)
        print(f"{name:<18} {text}")

    null = pipe.unet.config.num_class_embeds  # the null class, for what needs no class
    if null is not None:
        pictures = classes(pipe, args.num_inference_steps)
        write("classes.png", pictures, len(pictures) // len(SCALES), "one class per column, guidance_scale "
              f"{', '.join(f'{scale:g}' for scale in SCALES)} per row")  # fmt: skip
    pictures = strengths(pipe, images[:1], args.num_inference_steps)
    write("strength.png", pictures, 5, f"an image, then four samples each with strength {str(STRENGTHS)[1:-1]}")
    pictures, change = inpaint(pipe, images, args.num_inference_steps)
    text = f"images, masked images, and two samples each; mean change of known pixels {change:.4f}"
    write("inpainting.png", pictures, len(images), text)
    pictures, error = interpolate(pipe, images[:2], null)
    text = f"from one image to another by the ODE; largest error of both ends {error:.4f}"
    write("interpolation.png", pictures, 10, text)


if __name__ == "__main__":
    main()
