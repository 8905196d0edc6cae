"""Bits per dimension of any pixel-space `DDPMPipeline`, from a folder or from the Hub, without converting it.

    python examples/likelihood_of_a_diffusers_checkpoint.py --model google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --image_column img --max_images 64        # or: --image_dir my_images

measures it in two ways: by the variational bound with all T terms in DDPM's convention, and by the density of the
probability-flow ODE. The bound takes T (usually 1,000) network calls per image and the ODE 100 to 500, so use a GPU
for more than a few images. Without --model it uses a tiny network with random weights, which runs offline in 10
seconds on one CPU core and gives meaningless numbers:

    python examples/likelihood_of_a_diffusers_checkpoint.py

prints, besides progress bars:

    No --model: the weights are random, and the numbers below mean nothing.
    No images: patches of a photograph stand in for them.
    8 images of (3, 16, 16); bits/dim ± standard error over the images
    variational bound, T = 50:  56.497 ± 0.668
      prior 0.0001, diffusion 54.234, decoder 2.262; variance fixed_small, x̂ clipped
    probability-flow ODE:       15.007 ± 0.056, 93 network calls an image
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from diffusers_vdm import evaluate_ode, evaluate_vlb, noise_schedule_of


def random_checkpoint(folder):
    """Saves a diffusers checkpoint with random weights, for 16×16 images and 50 steps."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    unet = UNet2DModel(sample_size=16, layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50, beta_end=0.3)).save_pretrained(folder)


def pictures(args):
    """The user's images, or patches of a photograph from scikit-learn."""
    if args.image_dir:
        files = sorted(f for f in args.image_dir.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        return [Image.open(file) for file in files[: args.max_images]]
    if args.dataset_name:
        from datasets import load_dataset

        rows = load_dataset(args.dataset_name, split=f"{args.split}[:{args.max_images}]")
        return rows[args.image_column]
    from sklearn.datasets import load_sample_image

    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    return [photograph.crop((16 * i, 200, 16 * i + 16, 216)) for i in range(min(args.max_images, 8))]


def as_integers(images, unet):
    """uint8 of shape (N, C, H, W) in the network's image size. Resizing changes the likelihood."""
    size, mode = unet.config.sample_size, {1: "L", 3: "RGB"}[unet.config.in_channels]
    height, width = (size, size) if isinstance(size, int) else size
    if any(image.size != (width, height) for image in images):
        print(f"Images are resized to {width}×{height}: their bits per dimension are not those of the originals.")
    arrays = [np.array(image.convert(mode).resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).view(len(arrays), height, width, -1).permute(0, 3, 1, 2).contiguous()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder or a name on the Hub; without it, a tiny random network")
    parser.add_argument("--image_dir", type=Path, help="a folder of images")
    parser.add_argument("--dataset_name", help="a data set on the Hub")
    parser.add_argument("--split", default="test")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--max_images", type=int, default=16)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="tolerance of the ODE; smaller is slower")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            print("No --model: the weights are random, and the numbers below mean nothing.")
            random_checkpoint(folder)
        pipe = DDPMPipeline.from_pretrained(args.model or folder)
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    images = as_integers(pictures(args), pipe.unet)
    if args.dataset_name is None and args.image_dir is None:
        print("No images: patches of a photograph stand in for them.")

    # All T terms for each image, x = k/127.5 − 1 and the discretized Gaussian decoder, as in DDPM's paper.
    bound = evaluate_vlb(pipe.unet, pipe.scheduler, images, convention="ddpm")
    # The ODE uses x = 2(k + ½)/256 − 1, and noise within each level makes the integers continuous. The bound above has
    # another convention, so the two numbers are not directly comparable.
    schedule, kind = noise_schedule_of(pipe.scheduler), pipe.scheduler.config.prediction_type
    tolerances = {"rtol": args.tolerance, "atol": args.tolerance}
    density = evaluate_ode(pipe.unet, schedule, images, prediction_type=kind, **tolerances)
    print(f"{bound.num_images} images of {tuple(images.shape[1:])}; bits/dim ± standard error over the images")
    print(f"variational bound, T = {bound.num_steps}:  {bound.bpd:.3f} ± {bound.stderr_bpd:.3f}")
    print(
        f"  prior {bound.prior_bpd:.4f}, diffusion {bound.diffusion_bpd:.3f}, decoder {bound.reconstruction_bpd:.3f};"
        f" variance {bound.variance_type}, x̂ {'clipped' if bound.clip_sample else 'not clipped'}"
    )
    print(
        f"probability-flow ODE:       {density.bpd:.3f} ± {density.stderr_bpd:.3f},"
        f" {density.num_calls.mean():.0f} network calls an image"
    )


if __name__ == "__main__":
    main()
