"""Sample images from a saved model: same as `diffusers-vdm sample`.

python examples/sample.py --model runs/digits
"""

from diffusers_vdm.commands.sample import main

if __name__ == "__main__":
    main()
