"""Effect of the official initialization (`zero_init`), from short runs of examples/train.py on the digits.

    python benchmarks/initialization.py --num_threads 1

Two networks, each with and without `zero_init` for several seeds: the preset `digits`, and a deep narrow network (the
layout of `cifar10`: one level, 32 blocks down and 33 up, 32 channels). Prints the loss of the first line of metrics
and the final held-out bits/dim of the averaged weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEEP = {"layers_per_block": 32, "block_out_channels": (32,), "attention_head_dim": 32, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "dropout": 0.0}  # fmt: skip
OPTIONS = "--eval_steps 0 --eval_samples 16 --num_images 1 --ddpm_num_inference_steps 2 --checkpointing_steps 0 "
OPTIONS += "--logger none --logging_steps 10"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", choices=("digits", "deep"), nargs="+", default=["digits", "deep"])
    parser.add_argument("--steps", type=int, default=500, help="training steps of the digits network")
    parser.add_argument("--deep_steps", type=int, default=200, help="steps of the deep network, with 32 images each")
    parser.add_argument("--num_threads", type=int, default=1)
    return parser.parse_args()


def train(folder: Path, network: dict, zero_init: bool, seed: int, more: list[str]) -> dict:
    """Trains a network and returns its first loss and its final held-out bits/dim."""
    from diffusers_vdm import VDMUNet2DModel

    VDMUNet2DModel.from_preset("digits", **network, zero_init=zero_init).save_config(folder / "network")
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "--output_dir", str(folder / "run"), *more]
    command += ["--model_config_name_or_path", str(folder / "network"), "--seed", str(seed), *OPTIONS.split()]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"ACCELERATE_USE_CPU": "1"})
    with open(folder / "run" / "metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {"first_loss": lines[0]["train_bpd"], **{name: lines[-1][name] for name in ("eval_bpd", "eval_bpd_stderr")}}


def main() -> None:
    args = parse_options()
    threads = ["--num_threads", str(args.num_threads)]
    digits = ["--max_train_steps", str(args.steps), *threads]
    deep = ["--max_train_steps", str(args.deep_steps), "--train_batch_size", "32", "--learning_rate", "1e-3", *threads]
    runs = {"digits": ({}, digits), "deep": (DEEP, deep)}
    for name in args.networks:
        network, more = runs[name]
        for seed in args.seeds:
            for zero_init in (True, False):
                with tempfile.TemporaryDirectory() as folder:
                    result = train(Path(folder), network, zero_init, seed, more)
                print(json.dumps({"network": name, "zero_init": zero_init, "seed": seed, **result}), flush=True)


if __name__ == "__main__":
    main()
