"""All measurements that need a GPU, in one command and one file to send back.

    make gpu-report                                                     # about 40 minutes; CIFAR-10 from the Hub
    make gpu-report GPU_REPORT_FLAGS="--cifar10 PATH --race_minutes 5"
    python benchmarks/gpu_report.py --tiny --device cpu --output report.json     # small networks, to test the command

It runs the benchmarks of a training step, of the training loop and of evaluation with the paper's network, and the
race for `--race_minutes`. A part that fails is recorded with its error, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from diffusers_vdm.files import write_atomically

BENCHMARKS = Path(__file__).parent
# characters of the output of a part that are kept
KEPT = 4000


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--cifar10", default="uoft-cs/cifar10", help="data set on the Hub, or a local copy of it")
    parser.add_argument("--race_minutes", type=float, default=20.0, help="0 leaves out the race")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps")
    parser.add_argument("--output", type=Path, default=Path("gpu_report.json"))
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use; `--tiny --device cpu` tests the command without")
    return args


def parts(args: argparse.Namespace, folder: Path) -> dict[str, tuple[list[str], Path | None, float]]:
    """Each part: its command, the JSON file that it writes if any, and its time limit in seconds."""
    device = ["--device", args.device]
    small = ["--channels", "32", "--blocks", "1", "--batch_size", "2", "--repeats", "1", "--no_memory", "--no_profile"]
    paper = ["--preset", "cifar10", "--batch_size", "128"]
    step = [*(small if args.tiny else paper), *device]
    evaluation = ["--rounds", "1", "--num_steps", "2", "--batch_size", "2", "--no_memory"] if args.tiny else paper
    loop = ["--train_batch_size", "2", "--steps", "1", "--rounds", "1"]
    if not args.tiny:
        loop = ["--preset", "cifar10", "--train_batch_size", "128", "--mixed_precision", "bf16"]
    found: dict[str, tuple[list[str], Path | None, float]] = {}

    def add(name: str, script: str, options: list[str], output: bool = True, limit: float = 1200.0) -> None:
        file = folder / f"{name}.json" if output else None
        found[name] = ([script, *options, *(["--output", str(file)] if file else [])], file, limit)

    add("train_step", "train_step.py", step)
    if not args.tiny:
        compiled = [*step, "--compile", "--variants", "port", "bf16", "--no_memory"]
        add("train_step_compiled", "train_step.py", compiled)
        add("train_step_compiled_channels_last", "train_step.py", [*compiled, "--force_layout"])
    fast = ["--preset", "cifar10-fast", "--batch_size", "128", "--mixed_precision", "bf16"]
    fast += ["--mode", "reduce-overhead"]
    if args.tiny:
        fast = ["--preset", "digits-fast", "--batch_size", "2", "--rounds", "1", "--backend", "aot_eager"]
    add("compilation", "compilation.py", [*fast, *device])
    add("train_loop", "train_loop.py", loop)
    add("evaluation", "evaluation.py", [*evaluation, *device], output=False)
    if args.race_minutes:
        race = ["--device", args.device, "--seeds", "0", "--runs", str(folder / "runs")]
        if args.tiny:
            race += "--datasets digits --names default --budget 1e-4 --eval_samples 1".split()
        else:
            race += ["--datasets", "cifar10", "--cifar10", args.cifar10, "--names", "fast", "default"]
        add("race", "race.py", race, limit=60 * args.race_minutes)
    return found


def run(command: list[str], file: Path | None, limit: float) -> dict[str, Any]:
    """Runs a part; its result has the time, the error if there was one, the end of the output, and the JSON."""
    start, error = time.perf_counter(), None
    done = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / command[0]), *command[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output = done.communicate(timeout=limit)[0]
        error = f"exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGTERM)  # also train.py, which the race started and which saves and exits
        output, error = done.communicate()[0], f"stopped after {limit:.0f} s"
    result = {"command": " ".join(["python", f"benchmarks/{command[0]}", *command[1:]]), "error": error}
    result |= {"seconds": round(time.perf_counter() - start, 1), "output": output[-KEPT:]}
    if file is not None and file.is_file():
        result["results"] = json.loads(file.read_text(encoding="utf-8"))
    return result


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def main() -> None:
    args = parse_options()
    report: dict[str, Any] = {"machine": machine(args.device), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts(args, Path(folder)).items():
            print(f"{name} …", flush=True)
            report["parts"][name] = result = run(*part)
            print(f"  {result['seconds']} s" + (f", {result['error']}" if result["error"] else ""), flush=True)
            write_atomically(args.output, json.dumps(report, indent=1) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
