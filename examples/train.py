"""Train a Variational Diffusion Model or a DDPM: same as `diffusers-vdm train`, for `accelerate launch`.

accelerate launch examples/train.py --help
"""

from diffusers_vdm.commands.train import main

if __name__ == "__main__":
    main()
