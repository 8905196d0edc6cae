"""A complete training loop: Accelerate, the variational bound, averaged weights, and a saved pipeline.

    accelerate launch examples/train_minimal.py

trains on the 8×8 digits of scikit-learn, with as many processes as Accelerate starts, and saves a `VDMPipeline` and
`samples.png` in `runs/minimal`. It takes about 4 minutes on one CPU core and prints, besides progress bars:

    step 250: 2.193 bits/dim on a batch of training images
    step 500: 1.967 bits/dim on a batch of training images
    step 750: 2.068 bits/dim on a batch of training images
    step 1000: 2.048 bits/dim on a batch of training images
    step 1250: 1.901 bits/dim on a batch of training images
    step 1500: 1.956 bits/dim on a batch of training images
    297 held-out images: 1.8036 ± 0.0076 bits/dim
    saved the pipeline and samples.png in runs/minimal

`train.py` in the same folder adds checkpoints, resuming, metrics, other data sets and the Hub.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from diffusers_vdm import (
    MonotoneGammaNetwork,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_mc,
)

NUM_LEVELS = 17  # pixels of the digits are 0 … 16


def load_images():
    """1,500 training and 297 held-out images, integers of shape (N, 1, 8, 8)."""
    images = torch.from_numpy(load_digits().images.astype(np.uint8))[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:1500]], images[order[1500:]]


def endless(loader):
    while True:
        yield from loader


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=64, help="images per process")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--eval_samples", type=int, default=16, help="draws of (t, ε) for each held-out image")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/minimal"))
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(args.seed, device_specific=True)  # dropout differs; all processes use the weights of the first one
    train_images, test_images = load_images()
    unet = VDMUNet2DModel.from_preset("digits")
    schedule = MonotoneGammaNetwork(gamma_min=-7.5, gamma_max=5.0)  # γ = −log SNR at t = 0 and t = 1
    bound = VariationalBound(unet, schedule, num_levels=NUM_LEVELS)  # one module with the parameters of both
    # γ(t) can have a larger learning rate: its few parameters only reduce the variance of the loss
    groups = [{"params": unet.parameters()}, {"params": schedule.parameters(), "lr": 10 * args.learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    loader = DataLoader(TensorDataset(train_images), args.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(bound, optimizer, loader)
    ema = EMAModel(bound.parameters(), decay=0.999, use_ema_warmup=True, power=3 / 4)
    # every process draws its own times and noise
    generator = torch.Generator(accelerator.device).manual_seed(args.seed * 10_000 + accelerator.process_index)

    batches = endless(loader)
    model.train()
    for step in tqdm(range(1, args.train_steps + 1), disable=not accelerator.is_main_process):
        (images,) = next(batches)
        loss = model(images, generator=generator).loss  # bits/dim
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(bound.parameters())
        if step % 250 == 0 or step == args.train_steps:
            mean = accelerator.reduce(loss.detach(), "mean").item()
            accelerator.print(f"step {step}: {mean:.3f} bits/dim on a batch of training images")

    bound = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # evaluated in float32, even after bf16 training
    ema.copy_to(bound.parameters())
    result = evaluate_mc(bound, test_images, num_samples=args.eval_samples, accelerator=accelerator)
    if accelerator.is_main_process:
        print(f"{result.num_images} held-out images: {result.bpd:.4f} ± {result.stderr_bpd:.4f} bits/dim")
        scheduler = VDMScheduler.from_noise_schedule(schedule)  # γ(t) as a table in the scheduler's config
        pipe = VDMPipeline(unet.eval(), scheduler, schedule, num_levels=NUM_LEVELS)
        pipe.save_pretrained(args.output_dir)
        sampling = torch.Generator(accelerator.device).manual_seed(args.seed)
        samples = pipe(64, num_inference_steps=args.num_inference_steps, generator=sampling).images
        make_image_grid(samples, rows=8, cols=8, resize=64).save(args.output_dir / "samples.png")
        print(f"saved the pipeline and samples.png in {args.output_dir}")
    accelerator.wait_for_everyone()  # no process ends while the first one works
    # free DDP's reducer before the process group: if it is the last to hold the group, it can hang (torch 2.13)
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
