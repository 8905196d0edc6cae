"""Convert checkpoints from and to other codes: same as `diffusers-vdm convert`.

python examples/convert.py official checkpoints-0 vdm-cifar10
"""

from diffusers_vdm.commands.convert import main

if __name__ == "__main__":
    main()
