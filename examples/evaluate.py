"""Measure bits per dimension: same as `diffusers-vdm evaluate`, for `accelerate launch`.

accelerate launch examples/evaluate.py --model runs/digits
"""

from diffusers_vdm.commands.evaluate import main

if __name__ == "__main__":
    main()
