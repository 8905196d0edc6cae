"""Checkpoints of the official JAX code, written without the package by a msgpack writer of a few lines."""

import struct
from pathlib import Path

import numpy as np


def packed(value) -> bytes:
    """msgpack of maps, strings, integers, booleans and arrays, as flax lays them out."""
    if isinstance(value, dict):
        body = b"".join(packed(key) + packed(item) for key, item in value.items())
        return b"\xdf" + struct.pack(">I", len(value)) + body
    if isinstance(value, str):
        return b"\xda" + struct.pack(">H", len(value.encode())) + value.encode()
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, list):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(packed, value))
    if isinstance(value, np.ndarray):
        return extension(1, packed([list(value.shape), value.dtype.name, value.tobytes()]))
    raise TypeError(type(value))


def extension(code: int, content: bytes) -> bytes:
    return b"\xc9" + struct.pack(">Ib", len(content), code) + content


def nested(flat: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write_official(folder: Path, ema: dict, params: dict | None = None, number: int = 7, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    params = ema if params is None else params
    moments = {"count": np.array(3, np.int32), "mu": nested(params), "nu": nested(params)}
    tree = {
        "step": np.array(3, np.int32), "params": nested(params), "opt_state": {"0": moments, "1": {}},
        "ema_params": nested(ema), **more,
    }  # fmt: skip
    (folder / f"ckpt-{number}.flax").write_bytes(packed(tree))
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "/other/machine/ckpt-{number}"\n')
    return folder
