"""The commands, built on Accelerate; `python -m` or `accelerate launch -m` runs each of these modules."""
