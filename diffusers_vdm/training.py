"""What a training loop needs and a test must hold: images as integers, keyed randomness, checkpoints that are whole.

Every random draw of training is a function of (seed, step, position in the global batch), never of what was drawn
before. So a resumed run is the run that was never stopped, and how the batch is split over processes and accumulation
steps matters for nothing but the masks of dropout, which are drawn for each batch of each process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from .files import write_atomically
from .randomness import key_to_seed, keyed_generator  # noqa: F401

# ---- images ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Images as integers, decoded once and kept in memory.

    `images` are uint8 levels in [0, num_levels) of shape `(N, C, H, W)`, `labels` are int64 classes of shape `(N,)` or
    `None`, `name` tells where they come from, to be recorded with every number.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    num_levels: int
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """Hash of every pixel in order, so that a number can be told to be of the same data."""
        digest = hashlib.blake2b(repr(tuple(self.images.shape)).encode(), digest_size=8)
        digest.update(self.images.contiguous().numpy())
        return digest.hexdigest()


def load_digits_split() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's bundled 8×8 digits with 17 levels: a fixed split into 1,500 training and 297 held-out images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return tuple(
        ImageSet(images[part], labels[part], 17, f"scikit-learn digits, {name}")
        for part, name in ((order[:1500], "1500 training"), (order[1500:], "297 held-out"))
    )


def load_images(
    path: str,
    split: str,
    *,
    config_name: str | None = None,
    is_folder: bool = False,
    resolution: int | None = None,
    center_crop: bool = False,
    image_mode: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    num_workers: int = 2,
    progress_bar: bool = True,
) -> ImageSet:
    """A data set of images, from the Hub, a local copy of one, or a folder of image files.

    Args:
        path (`str`): name on the Hub, or folder.
        split, config_name (`str`): split, slices allowed (`"train[:2000]"`), and configuration of the data set.
        is_folder (`bool`, defaults to `False`): read `path` with the `imagefolder` builder.
        resolution (`int`, *optional*): side of the square images; smaller sides are resized to it and the rest is
            cropped. Without it images stay as they are and must all have one size.
        center_crop (`bool`, defaults to `False`): crop the middle; else a place drawn once for each image.
        image_mode (`"RGB"` or `"L"`, *optional*): convert to it; else all images must have the mode of the first one,
            which must be one of these two.
        image_column, label_column (`str`, *optional*): columns; found by their type if not given.
        cache_dir (`str`, *optional*): datasets' cache.
        seed (`int`, defaults to 0): key of the crops.
        num_workers (`int`, defaults to 2): decoding threads.
        progress_bar (`bool`, defaults to `True`): show a tqdm bar while decoding.

    Returns: [`ImageSet`] with 256 levels.
    Raises: `ValueError` for an empty split, missing columns, images that differ in size or mode, naming the image.
    """
    import datasets

    if is_folder:
        data = datasets.load_dataset("imagefolder", data_dir=path, split=split, cache_dir=cache_dir)
    else:
        data = datasets.load_dataset(path, config_name, split=split, cache_dir=cache_dir)
    if len(data) == 0:
        raise ValueError(f"split {split!r} of {path!r} is empty; there is nothing to train on.")
    image_column = _column(data, image_column, "image_column", datasets.Image)
    if label_column is None:
        label_column = next((n for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)), None)
    elif label_column not in data.features:
        raise ValueError(f"label_column {label_column!r} is not in the data set, which has {list(data.features)}.")
    mode = image_mode or data[0][image_column].mode

    def read(i: int) -> np.ndarray:
        try:
            image = data[i][image_column]
            return _pixels(image, mode, image_mode is not None, resolution, None if center_crop else (seed, i))
        except (ValueError, OSError) as error:
            raise ValueError(f"image {i} of {path!r} ({split}): {error}") from error

    first = read(0)
    images = torch.empty((len(data), *first.shape), dtype=torch.uint8)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        decoded = pool.map(read, range(len(data)))
        for i, pixels in enumerate(tqdm(decoded, total=len(data), desc="decoding", disable=not progress_bar)):
            if pixels.shape != first.shape:
                raise ValueError(
                    f"image {i} of {path!r} has shape {pixels.shape[1:]}, the first one {first.shape[1:]}; "
                    "set resolution."
                )
            images[i] = torch.from_numpy(pixels)
    labels = None if label_column is None else torch.tensor(data[label_column][:], dtype=torch.int64)
    return ImageSet(images, labels, 256, f"{path}, {split}")


def _column(data: Any, name: str | None, argument: str, feature_type: type) -> str:
    found = [column for column, feature in data.features.items() if isinstance(feature, feature_type)]
    if name is None and found:
        return found[0]
    if name is None or name not in found:
        raise ValueError(f"{argument} must name a column of images, got {name!r}; there are {found or 'none'}.")
    return name


def _pixels(
    image: Image.Image, mode: str, convert: bool, resolution: int | None, crop_key: tuple | None
) -> np.ndarray:
    """uint8 array `(C, H, W)` of a PIL image, resized and cropped."""
    if mode not in ("L", "RGB"):
        raise ValueError(
            f"images must be 8-bit grayscale ('L') or RGB, got mode {mode!r}; set image_mode to convert them, knowing "
            "that transparency and 16-bit depth are lost, and that bits/dim are then of the converted images."
        )
    if image.mode != mode:
        if not convert:
            raise ValueError(f"mode {image.mode!r}, but the first image has {mode!r}; set image_mode to convert all.")
        image = image.convert(mode)
    if resolution is not None and image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        if crop_key is not None:
            share = torch.rand(2, generator=keyed_generator(*crop_key)).tolist()
            left, top = int(share[0] * (width - resolution + 1)), int(share[1] * (height - resolution + 1))
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.array(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def histogram_bpd(train: ImageSet, test: ImageSet) -> float:
    """Bits/dim of `test` under the histogram of each pixel of `train`, with a tenth of a count added to each level."""
    counts = torch.full((train.images[0].numel(), train.num_levels), 0.1, dtype=torch.float64)
    flat = train.images.flatten(1).long().T
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    log_p = torch.log2(counts / counts.sum(1, keepdim=True))
    return -float(log_p.gather(1, test.images.flatten(1).long().T).mean())


# ---- keyed randomness --------------------------------------------------------------------------------------------


# share of the images whose class is withheld from a class-conditional network
LABEL_DROPOUT = 0.1


def batch_indices(positions: Iterable[int], num_images: int, seed: int) -> torch.Tensor:
    """Which image stands at each of `positions` of the endless order of training: one permutation after another.

    The permutation of an epoch is keyed on (seed, epoch), so no order needs to be replayed to find one's place.
    """
    positions = list(positions)
    epochs = {position // num_images for position in positions}
    orders = {e: torch.randperm(num_images, generator=keyed_generator(seed, "order", e)) for e in epochs}
    return torch.stack([orders[p // num_images][p % num_images] for p in positions])


@dataclass(frozen=True)
class KeyedBatch:
    """One micro-batch and all its randomness, on the CPU."""

    images: torch.Tensor
    labels: torch.Tensor | None
    flipped: torch.Tensor
    withheld: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    eps_0: torch.Tensor


def keyed_batch(
    data: ImageSet, step: int, rows: range, global_batch_size: int, seed: int, random_flip: bool = False
) -> KeyedBatch:
    """Rows `rows` of the global batch of `step`: images in keyed order, and (t, ε, ε_0, flip, label withheld) of each.

    t_i = (u + i/B) mod 1 over the whole global batch, whoever computes its rows [VDM app. I.1].
    """
    index = batch_indices((step * global_batch_size + i for i in rows), len(data), seed)
    images = data.images[index]
    shift = torch.rand((), generator=keyed_generator(seed, "t", step), dtype=torch.float64)
    t = (shift + torch.tensor(list(rows), dtype=torch.float64) / global_batch_size) % 1.0
    noise, flipped, withheld = [], [], []
    for i in rows:
        generator = keyed_generator(seed, "noise", step, i)
        noise.append(torch.randn((2, *images.shape[1:]), generator=generator))
        flip, withhold = torch.rand(2, generator=generator).tolist()
        flipped.append(random_flip and flip < 0.5)
        withheld.append(withhold < LABEL_DROPOUT)
    eps, eps_0 = torch.stack(noise, 1)
    flips = torch.tensor(flipped)
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    labels = None if data.labels is None else data.labels[index]
    return KeyedBatch(images, labels, flips.float(), torch.tensor(withheld), t, eps, eps_0)


# ---- checkpoints -------------------------------------------------------------------------------------------------

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Writes `output_dir/checkpoint-{step}` as safetensors and JSON: under another name first, then renamed.

    Each group of `tensors` is a file, `state` is anything that JSON holds, and with `total_limit` only so many of the
    newest checkpoints are kept, at least one. Returns the folder.
    """
    output_dir = Path(output_dir)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, group in tensors.items():
        path = temporary / f"{name}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_atomically(temporary / "state.json", json.dumps({**state, "step": step}, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    if total_limit is not None:
        remove_checkpoints(output_dir, keep=max(1, total_limit))
    return final


def remove_checkpoints(output_dir: str | os.PathLike, keep: int = 0) -> None:
    """Removes the complete checkpoints of a run but for the `keep` newest."""
    complete = list_checkpoints(output_dir)
    for folder in complete[: len(complete) - keep]:
        shutil.rmtree(folder)


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)]
    return sorted((p for p in folders if (p / "state.json").is_file()), key=lambda p: int(p.name.split("-")[1]))


def load_checkpoint(folder: str | os.PathLike) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """What [`save_checkpoint`] wrote: `(tensors, state)`; `ValueError` for a folder that is not one."""
    folder = Path(folder)
    if not (folder / "state.json").is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: it has no state.json.")
    tensors, path = {}, folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.safetensors")):
            tensors[path.stem] = load_file(path)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); go on from an older checkpoint, by its folder.") from error
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's moments and counters as flat tensors, `"{parameter index}.{name}"`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what [`optimizer_tensors`] took; the options of its groups stay."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(
    output_dir: str | os.PathLike,
    step: int,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel | None,
    run: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Writes all that a run needs to go on; `run` is its description, compared when it does."""
    tensors = {"model": objective.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    rates = {name: value for name, value in lr_scheduler.state_dict().items() if name != "lr_lambdas"}
    state: dict[str, Any] = {"run": run, "lr_scheduler": rates}
    if ema is not None:
        tensors["ema"] = {str(i): p for i, p in enumerate(ema.shadow_params)}
        state["ema_step"] = ema.optimization_step
    return save_checkpoint(output_dir, step, tensors, state, total_limit)


def find_checkpoint(output_dir: str | os.PathLike, name: str) -> Path:
    """The folder that `"latest"` or a path stands for. Raises `ValueError` where there is none."""
    if name != "latest":
        return Path(name)
    complete = list_checkpoints(output_dir)
    if not complete:
        raise ValueError(f"resume_from_checkpoint='latest', but there is no complete checkpoint in {output_dir}.")
    return complete[-1]


# options that a resumed run may change: they say where to and how often, not what is trained
_FREE_OPTIONS = {
    "output_dir", "overwrite_output_dir", "logging_steps", "eval_steps", "eval_batch_size", "eval_samples",
    "max_eval_images", "num_images", "ddpm_num_inference_steps", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "logger", "logging_dir", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo",
    "cache_dir", "dataloader_num_workers", "num_threads", "gradient_checkpointing", "train_batch_size",
    "gradient_accumulation_steps", "save_images_epochs", "save_model_epochs",
}  # fmt: skip


def restore(
    folder: str | os.PathLike,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel | None,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Puts a checkpoint of [`save`] back and returns its state, with `step` and the saved `run`.

    Raises: `ValueError` if the run is another one: other data, another global batch, other options that matter.
    """
    tensors, state = load_checkpoint(folder)
    before, now = state["run"], run
    fixed = set(now["options"]) - _FREE_OPTIONS
    if now["options"].get("dropout"):  # its masks are drawn for each batch of each process
        fixed |= {"train_batch_size", "gradient_accumulation_steps"}
    if str(now["options"].get("lr_scheduler")).startswith("constant"):  # else the rates depend on where they end
        fixed -= {"max_train_steps", "num_epochs"}
    differences = {name for name in fixed if now["options"].get(name) != before["options"].get(name)}
    for name in ("data", "global_batch_size"):
        if before[name] != now[name]:
            differences.add(name)
    if differences:
        told = "; ".join(
            f"{k}: {before['options'].get(k, before.get(k))!r} → {now['options'].get(k, now.get(k))!r}"
            for k in sorted(differences)
        )
        raise ValueError(f"this is not the run of {folder}: {told}. Start a new one in another output_dir.")
    if ("ema" in tensors) != (ema is not None):
        raise ValueError(f"{folder} {'has' if 'ema' in tensors else 'lacks'} averaged weights; use_ema must agree.")
    objective.load_state_dict(tensors["model"])
    load_optimizer_tensors(optimizer, tensors["optimizer"])
    lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), **state["lr_scheduler"]})
    for group, rate in zip(optimizer.param_groups, state["lr_scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    if ema is not None:
        for i, shadow in enumerate(ema.shadow_params):
            shadow.copy_(tensors["ema"][str(i)])
        ema.optimization_step = state["ema_step"]
    return state


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Sequence[nn.Parameter]):
    """Within the context the parameters hold the averaged weights; nothing changes if `ema` is `None`."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


# ---- metrics -----------------------------------------------------------------------------------------------------


def append_metrics(path: str | os.PathLike, metrics: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def truncate_metrics(path: str | os.PathLike, step: int) -> None:
    """Keeps the lines up to `step`: what comes after the checkpoint will be written again."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomically(path, "".join(f"{line}\n" for line in kept))
