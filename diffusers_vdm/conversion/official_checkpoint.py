"""Read and write official JAX checkpoints, a `clu` folder with a `flax` msgpack file, without installing clu or flax.

The folder holds `checkpoint`, a text file that names the newest `ckpt-N`, and `ckpt-N.flax`, one msgpack map

    {step, params, ema_params, opt_state}

whose arrays are extension 1 (scalars: 3) around a msgpack list [shape, name of the dtype, bytes in C order, little
endian]. Files are untrusted: every length is checked against the available bytes before memory is allocated.

The second part maps the layout of the weights, the learned γ(t) and the layer names to ours and back.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from ..noise_schedules import FixedLinearGamma, LearnedLinearGamma, MonotoneGammaNetwork, NoiseSchedule

# flax splits arrays of more than this many bytes into pieces, so no valid piece is longer
MAX_PIECE = 2**30
MAX_ENTRIES = 20_000  # of all maps of one tree; the largest published network has 1,600
MAX_NAME, MAX_DEPTH, MAX_NDIM = 256, 6, 8
DTYPES = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8", "uint32": "<u4"}
# other formats, by their first bytes, for a clear error message
FOREIGN = {
    b"PK\x03\x04": "a zip archive (PyTorch's format?)", b"{": "a JSON file", b"\x1f\x8b": "packed with gzip",
    b"\xfd7zXZ": "packed with xz", b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle", b"\x89HDF": "an HDF5 file",
}  # fmt: skip
_CHUNKED = "__msgpack_chunked_array__"


def checkpoint_file(path: str | os.PathLike) -> Path:
    """The `.flax` file of a checkpoint: `path` itself, or the newest one in the clu folder `path`.

    The newest is the file named in the text file `checkpoint`, of which only the base name is used because the path
    may be of another machine. Without that text file it is the `ckpt-N.flax` with the largest N.

    Raises: `ValueError`, `FileNotFoundError`.
    """
    path = Path(path)
    if path.is_file():
        return checkpoint_file(path.parent) if path.name == "checkpoint" else path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a local folder that holds ckpt-N.flax.")
    found = {int(m[1]): file for file in path.iterdir() if (m := re.fullmatch(r"ckpt-(\d{1,18})\.flax", file.name))}
    text = path / "checkpoint"
    if text.is_file():
        with open(text, "rb") as file:
            content = file.read(2**16).decode("utf-8", "replace")
        named = re.search(r'^\s*model_checkpoint_path:\s*"([^"\n]*)"', content, re.MULTILINE)
        if named is None:
            raise ValueError(f"{text} names no model_checkpoint_path; give the path of the .flax file itself.")
        base = re.split(r"[/\\]", named[1])[-1]
        if not re.fullmatch(r"[\w-][\w.-]{0,200}", base):
            raise ValueError(
                f"{text} names {named[1][:200]!r}, which is not a file name; give the path of the .flax file."
            )
        file = path / f"{base.removesuffix('.flax')}.flax"
        if not file.is_file():
            there = ", ".join(sorted(f.name for f in found.values())) or "no ckpt-N.flax"
            raise ValueError(f"{text} names {base!r}, but the folder holds {there}; give the path of the .flax file.")
        return file
    if not found:
        inside = next((f.parent for f in sorted(path.glob("*/ckpt-*.flax"))), None)
        hint = f"did you mean {inside}?" if inside else "give the folder written by clu, such as checkpoints-0."
        raise ValueError(f"{path} holds no ckpt-N.flax; {hint}")
    return found[max(found)]


def read_checkpoint(path: str | os.PathLike, weights: str = "ema_params") -> tuple[dict[str, np.ndarray], int]:
    """One set of weights of a checkpoint (`"ema_params"` or `"params"`), and its training step.

    The file is read as a stream; the optimizer's moments and the other set of weights are skipped.

    Returns: `{"a/b/c": array}`, read-only arrays by their path in the tree, and the step (0 if the file has none).
    Raises: `ValueError` with the file and the reason if it is not such a checkpoint, `ImportError` without msgpack.
    """
    file = checkpoint_file(path)
    msgpack = _msgpack()
    size = file.stat().st_size
    errors = (ValueError, TypeError, OverflowError, RecursionError, BufferError, msgpack.UnpackException)
    try:
        with open(file, "rb") as stream:
            _check_format(stream.read(8))
            stream.seek(0)
            tree, step = _read_map(msgpack, stream, size, weights)
        return _flattened(tree), step
    except msgpack.OutOfData as error:
        raise ValueError(f"{file} is not a complete checkpoint of the official code: it ends too early.") from error
    except errors as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{file} is not a checkpoint of the official code: {reason}") from error


def write_checkpoint(
    file: str | os.PathLike,
    shapes: Mapping[str, tuple[int, ...]],
    array_of: Callable[[str], np.ndarray],
    step: int = 0,
) -> None:
    """Writes `ckpt-N.flax` as a stream, one array in memory at a time: params, equal ema_params, zero moments.

    `shapes` maps the path `a/b/c` of every weight to its shape, and `array_of` returns the weight of a path; all are
    written in float32. The write is not atomic: an error leaves an incomplete file.

    Raises: `ValueError` for arrays of another shape or of more than 2^30 bytes, `ImportError` without msgpack.
    """
    msgpack = _msgpack()
    packer = msgpack.Packer(use_bin_type=True)
    nested: dict[str, Any] = {}
    for name in shapes:
        *parents, leaf = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = name

    def pieces(node: Any, make: Callable[[str], np.ndarray]) -> Iterator[bytes]:
        if isinstance(node, dict):
            yield packer.pack_map_header(len(node))
            for key, value in node.items():
                yield packer.pack(key)
                yield from pieces(value, make)
        elif isinstance(node, tuple):  # the same tree with other arrays
            yield from pieces(*node)
        else:
            is_count = isinstance(node, int)
            array = np.array(node, dtype="<i4") if is_count else make(node).astype("<f4", order="C")
            shape = () if is_count else shapes[node]
            if array.shape != shape or array.nbytes > MAX_PIECE:
                raise ValueError(f"{node} must have shape {shape} and at most 2^30 bytes, got shape {array.shape}.")
            content = packer.pack((array.shape, array.dtype.name, array.tobytes()))
            yield packer.pack(msgpack.ExtType(1, content))  # `pack_ext_type` of msgpack 1.0 returns None

    zeros = (nested, lambda name: np.zeros(shapes[name], dtype="<f4"))
    moments = {"count": step, "mu": zeros, "nu": zeros}
    tree = {
        "step": step, "params": nested, "ema_params": nested,
        "opt_state": {"0": moments, "1": {"inner_state": {}}, "2": {}},
    }  # fmt: skip
    with open(file, "wb") as stream:
        for piece in pieces(tree, array_of):
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())


def _msgpack():
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("official checkpoints are msgpack files; run `pip install msgpack` to read them.") from error
    return msgpack


def _check_format(start: bytes) -> None:
    kind = next((name for magic, name in FOREIGN.items() if start.startswith(magic)), None)
    if kind:
        raise ValueError(f"it is {kind}, not a msgpack map.")
    if not start:
        raise ValueError("it is empty.")
    if not (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        raise ValueError(f"it is not a msgpack map: it starts with {start!r}.")


def _read_map(msgpack, stream: BinaryIO, size: int, wanted: str) -> tuple[dict, int]:
    """The entries `wanted` and `step` of the top-level map; other entries are skipped."""
    budget = [MAX_ENTRIES]

    def pairs(items: list[tuple[Any, Any]]) -> Any:
        budget[0] -= len(items)
        if budget[0] < 0:
            raise ValueError(f"it has more than {MAX_ENTRIES} entries.")
        found: dict[str, Any] = {}
        for key, value in items:
            _check_name(key)
            if key in found:
                raise ValueError(f"the key {key!r} occurs twice.")
            found[key] = value
        return _join_chunks(found) if _CHUNKED in found else found

    # Lists occur only inside arrays; max_array_len=0 keeps msgpack from allocating memory for claimed lengths.
    unpacker = msgpack.Unpacker(
        stream, read_size=min(2**20, size + 1), max_buffer_size=min(size, MAX_PIECE) + 2**20, raw=False,
        strict_map_key=True, object_pairs_hook=pairs, ext_hook=lambda code, data: _array(msgpack, code, data),
        max_str_len=min(size, MAX_NAME), max_bin_len=0, max_array_len=0, max_map_len=min(size, 4096),
        max_ext_len=min(size, MAX_PIECE + 4096),
    )  # fmt: skip
    count = unpacker.read_map_header()
    kept: dict[str, Any] = {}
    seen: list[str] = []
    if count > 64:
        raise ValueError(f"its map must have step, params, ema_params and opt_state, got {count} entries.")
    for _ in range(count):
        key = unpacker.unpack()
        _check_name(key)
        if key in seen:
            raise ValueError(f"the key {key!r} occurs twice.")
        seen.append(key)
        if key in (wanted, "step"):
            kept[key] = unpacker.unpack()
        else:
            unpacker.skip()
    if unpacker.tell() != size:
        raise ValueError(f"{size - unpacker.tell()} bytes follow its end.")
    if not isinstance(kept.get(wanted), dict):
        raise ValueError(f"it has no map {wanted!r}, but {seen}.")
    step = kept.get("step", 0)
    if isinstance(step, np.ndarray) and step.size == 1 and step.dtype.kind in "iu":
        step = int(step.reshape(()))
    if not isinstance(step, int) or step < 0:
        raise ValueError("its step is not a number of steps.")
    return kept[wanted], step


def _check_name(key: Any) -> None:
    if not isinstance(key, str) or not re.fullmatch(r"\w[\w.]*", key, re.ASCII):
        raise ValueError(f"{str(key)[:80]!r} is not the name of a module or a tensor.")


def _array(msgpack, code: int, data: bytes) -> np.ndarray:
    """[shape, dtype, bytes] as an array that shares the bytes, after a check that all three agree."""
    if code not in (1, 3):
        raise ValueError(f"it holds the unknown msgpack extension {code}; arrays are 1 or 3.")
    content = msgpack.unpackb(
        data, raw=False, max_array_len=2 * MAX_NDIM, max_map_len=0, max_ext_len=0, max_str_len=MAX_NAME
    )
    if not (isinstance(content, list) and len(content) == 3 and isinstance(content[0], list)):
        raise ValueError("one of its arrays is not [shape, dtype, bytes].")
    shape, name, raw = content
    _check_shape(shape)
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"one of its arrays has the type {str(name)[:40]!r}; known are {', '.join(DTYPES)}.")
    dtype = np.dtype(DTYPES[name])
    if not isinstance(raw, bytes) or math.prod(shape) * dtype.itemsize != len(raw):
        length = len(raw) if isinstance(raw, bytes) else "no"
        raise ValueError(f"an array of shape {tuple(shape)} in {name} has {length} bytes.")
    return np.frombuffer(raw, dtype).reshape(shape)


def _check_shape(shape: list) -> None:
    ok = len(shape) <= MAX_NDIM and all(type(length) is int and 0 < length <= 2**40 for length in shape)
    if not ok:
        raise ValueError(f"one of its arrays has the shape {str(shape)[:80]}: lengths must be positive integers.")


def _join_chunks(entry: dict[str, Any]) -> np.ndarray:
    """An array that flax has split into flat pieces."""
    shape, chunks = ([*_chunk_list(entry.get(key))] for key in ("shape", "chunks"))
    _check_shape(shape)
    flat = all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks)
    if not chunks or not flat or len({chunk.dtype for chunk in chunks}) > 1:
        raise ValueError("the pieces of an array are not flat arrays of one type.")
    if math.prod(shape) != sum(chunk.size for chunk in chunks):
        raise ValueError(f"the pieces of an array of shape {tuple(shape)} have {sum(c.size for c in chunks)} numbers.")
    return np.concatenate(chunks).reshape(shape)


def _chunk_list(entry: Any) -> list:
    if not isinstance(entry, dict) or set(entry) != {str(i) for i in range(len(entry))}:
        raise ValueError("an array lacks some of its pieces.")
    return [entry[str(i)] for i in range(len(entry))]


def _flattened(tree: dict) -> dict[str, np.ndarray]:
    """`{"a": {"b": array}}` as `{"a/b": array}`, without recursion because the nesting depth is untrusted."""
    found: dict[str, np.ndarray] = {}
    level = {"": tree}
    for _ in range(MAX_DEPTH):
        deeper = {}
        for path, node in level.items():
            for key, value in node.items():
                name = f"{path}{key}"
                if isinstance(value, dict):
                    deeper[f"{name}/"] = value
                elif isinstance(value, np.ndarray):
                    found[name] = value
                else:
                    raise ValueError(f"{name} is a {type(value).__name__}, not a tensor.")
        level = deeper
    if level:
        raise ValueError(f"{next(iter(level))[:80]} is nested deeper than {MAX_DEPTH} levels.")
    return found


# ---- the layout of the weights ----------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """The names of one layer: ours, the official one and addtt's."""

    ours: str
    official: str
    addtt: str


_TOP = [
    _Layer("time_embedding.linear_1", "dense0", "embed_conditioning.0"),
    _Layer("time_embedding.linear_2", "dense1", "embed_conditioning.2"),
    _Layer("conv_in", "conv_in", "conv_in"), _Layer("conv_norm_out", "GroupNorm_0", "conv_out.0"),
    _Layer("conv_out", "conv_out", "conv_out.2"),
]  # fmt: skip
# in addtt's code `last` is 2, or 3 after a dropout layer
_RESNET = [
    _Layer("norm1", "GroupNorm_0", "net1.0"), _Layer("conv1", "conv1", "net1.2"),
    _Layer("time_emb_proj", "cond_proj", "cond_proj"), _Layer("norm2", "GroupNorm_1", "net2.0"),
    _Layer("conv2", "conv2", "net2.last"), _Layer("conv_shortcut", "nin_shortcut", "skip_conv"),
]  # fmt: skip
# addtt's layer 1 computes q, k and v together
_ATTENTION = [
    _Layer("group_norm", "GroupNorm_0", "0"), _Layer("to_q", "q", "1.q"), _Layer("to_k", "k", "1.k"),
    _Layer("to_v", "v", "1.v"), _Layer("to_out.0", "proj_out", "3"),
]  # fmt: skip


def _layers(num_blocks: int, attention: bool) -> Iterator[_Layer]:
    """Every layer of a network of one level, with attention in the middle or everywhere."""
    places = [(_TOP, "", "", ""), (_ATTENTION, "mid_block.attentions.0.", "mid.attn_1/", "mid_attn_block.layers.")]
    for i in range(2):
        places.append((_RESNET[:-1], f"mid_block.resnets.{i}.", f"mid.block_{i + 1}/", f"mid_resnet_block_{i + 1}."))
    for way, count in (("down", num_blocks), ("up", num_blocks + 1)):
        for i in range(count):
            ours, official, addtt = f"{way}_blocks.0.", f"{way}.", f"{way}_blocks.{i}."
            resnet = _RESNET if way == "up" else _RESNET[:-1]  # only up blocks change the number of channels
            places.append((resnet, f"{ours}resnets.{i}.", f"{official}block_{i}/", f"{addtt}resnet_block."))
            if attention:
                names = (f"{ours}attentions.{i}.", f"{official}attn_{i}/", f"{addtt}attention_block.layers.")
                places.append((_ATTENTION, *names))
    for layers, *prefixes in places:
        for layer in layers:
            yield _Layer(*(prefix + name for prefix, name in zip(prefixes, layer, strict=True)))


def tensor_names(num_blocks: int, attention: bool, which: str) -> Iterator[tuple[str, str]]:
    """`(our key, their key)` of every tensor; `which` is `"official"` or `"addtt"`."""
    for layer in _layers(num_blocks, attention):
        norm = "norm" in layer.ours
        for leaf in ("weight", "bias"):
            if layer.ours.endswith("time_emb_proj") and leaf == "bias":
                continue  # the foreign layer has no bias
            if which == "official":
                name = "bias" if leaf == "bias" else "scale" if norm else "kernel"
                yield f"{layer.ours}.{leaf}", f"score_model/{layer.official}/{name}"
            else:
                yield f"{layer.ours}.{leaf}", f"model.{layer.addtt}.{leaf}"


def official_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of our tensor `key` in the official layout; 1×1 convolutions are dense layers there."""
    if len(shape) == 4 and "conv_shortcut" not in key:
        return (*shape[2:], shape[1], shape[0])
    return shape if len(shape) == 1 else (shape[1], shape[0])


def from_official(array: np.ndarray) -> np.ndarray:
    """An official tensor in PyTorch's layout; dense kernels stay two-dimensional."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def to_official(key: str, array: np.ndarray) -> np.ndarray:
    """Our tensor `key` in the official layout."""
    if array.ndim == 4 and "conv_shortcut" not in key:
        return array.transpose(2, 3, 1, 0)
    return array if array.ndim == 1 else array.reshape(array.shape[:2]).T


def gamma_from_official(arrays: dict[str, np.ndarray], gamma_min: float, gamma_max: float) -> NoiseSchedule:
    """The schedule, in float64, from the tensors `w`, `b` or `l1/kernel`, …, `l3/kernel`, or from none (fixed linear).

    The official network γ(t) = b₁ + |w₁| t + (1/n) Σ_j |w₃_j| (2σ(|w₂_j| (2t − 1) + b₂_j) − 1) is not normalized. Ours
    is, and its linear term has weight one: a = w₃/|w₁|, and the ends are γ(0) and γ(1).

    Raises: `ValueError` for other names or shapes, numbers that are not finite, and |w| or |w₁| of zero.
    """
    n = arrays["l2/bias"].size if "l2/bias" in arrays else 1
    network = {"l1/kernel": (1, 1), "l1/bias": (1,), "l2/kernel": (1, n), "l2/bias": (n,), "l3/kernel": (n, 1)}
    shapes = network if "l1/kernel" in arrays else {"w": (1,), "b": (1,)}
    if not arrays:
        return FixedLinearGamma(gamma_min, gamma_max)
    if set(arrays) != set(shapes):
        raise ValueError(f"gamma must have w and b, or those of the network, {sorted(network)}; got {sorted(arrays)}.")
    for name, array in arrays.items():
        scalar = array.shape == () and shapes[name] == (1,)  # w and b may have no axis
        if not (scalar or array.shape == shapes[name]) or not np.isfinite(array).all():
            raise ValueError(f"gamma/{name} has shape {array.shape}, not {shapes[name]}, or is not finite.")
    given = {name: array.astype(np.float64).reshape(-1) for name, array in arrays.items()}
    straight = "w" if "w" in given else "l1/kernel"
    if given[straight][0] == 0:
        raise ValueError(f"gamma/{straight} must not be 0: the linear term of our γ cannot vanish.")
    if straight == "w":
        schedule: NoiseSchedule = LearnedLinearGamma(gamma_min, gamma_max)
        values = {"weight": given["w"], "bias": given["b"]}
    else:
        schedule = MonotoneGammaNetwork(gamma_min, gamma_max, hidden_dim=n, learn_ends=True)
        w2, b2, w3, scale = given["l2/kernel"], given["l2/bias"], given["l3/kernel"], np.abs(given["l1/kernel"])
        at_0, at_1 = _hidden_ends(w2, b2, w3)
        values = {
            "bias": given["l1/bias"] + at_0, "weight": scale + at_1 - at_0,
            "hidden_weight": w2, "hidden_bias": b2, "output_weight": w3 / scale,
        }  # fmt: skip
    schedule.double().load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    return schedule.eval()


def gamma_to_official(schedule: NoiseSchedule) -> dict[str, np.ndarray]:
    """Inverse of [`gamma_from_official`], in float64: `{}` for a fixed γ, else w and b of a line, or l1, l2 and l3."""
    gamma_0, gamma_1 = (float(end.detach()) for end in schedule.ends())
    if isinstance(schedule, MonotoneGammaNetwork):
        parameters = (schedule.hidden_weight, schedule.hidden_bias, schedule.output_weight)
        w2, b2, a = (parameter.detach().cpu().double().numpy() for parameter in parameters)
        at_0, at_1 = _hidden_ends(w2, b2, a)
        scale = (gamma_1 - gamma_0) / (1 + at_1 - at_0)
        first = {"l1/kernel": np.array([[scale]]), "l1/bias": np.array([gamma_0 - scale * at_0])}
        return {**first, "l2/kernel": w2[None], "l2/bias": b2, "l3/kernel": (scale * a)[:, None]}
    if isinstance(schedule, LearnedLinearGamma):  # signed, as in the checkpoint
        return {"w": schedule.weight.detach().cpu().numpy(), "b": schedule.bias.detach().cpu().numpy()}
    if (gamma_0, gamma_1) == (schedule.config.gamma_min, schedule.config.gamma_max):
        return {}
    return {"w": np.array([gamma_1 - gamma_0]), "b": np.array([gamma_0])}


def _hidden_ends(w: np.ndarray, b: np.ndarray, a: np.ndarray) -> tuple[float, float]:
    """The sum over the hidden units at t = 0 and 1, for which 2σ(x) − 1 = tanh(x/2)."""
    at_0, at_1 = (float(np.mean(np.abs(a) * np.tanh((sign * np.abs(w) + b) / 2))) for sign in (-1, 1))
    return at_0, at_1
