"""Print the versions, the machine and its devices for a bug report.

diffusers-vdm env
"""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "huggingface-hub", "safetensors", "numpy", "pillow",
            "constriction")  # fmt: skip


def environment() -> dict[str, str]:
    """Versions of this package, its dependencies, Python and the system, and the devices that PyTorch finds."""
    import torch

    from .. import __version__

    rows = {"diffusers_vdm": __version__}
    for name in PACKAGES:
        try:
            rows[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows[name] = "not installed"
    rows |= {"Python": platform.python_version(), "system": platform.platform()}
    rows["CPU"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows["CUDA"] = f"{torch.version.cuda}: {', '.join(devices)}" if devices else "no device"
    rows["MPS"] = "available" if torch.backends.mps.is_available() else "no device"
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    for name, value in environment().items():
        print(f"  {name:<18}{value}")


if __name__ == "__main__":
    main()
