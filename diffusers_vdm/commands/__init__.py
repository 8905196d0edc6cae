"""The commands: thin, driven by Accelerate, each a module that `python -m` or `accelerate launch -m` runs."""
