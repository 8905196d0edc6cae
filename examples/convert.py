"""Convert checkpoints of the official JAX code, of addtt's and of diffusers, in and out; see `--help`.

    python examples/convert.py official checkpoints-0 vdm-cifar10

The same as `python -m diffusers_vdm.conversion`.
"""

from diffusers_vdm.conversion import main

if __name__ == "__main__":
    main()
