"""`python -m diffusers_vdm.conversion`: same as `diffusers-vdm convert`."""

from ..commands.convert import main

if __name__ == "__main__":
    main()
