"""Captions, embedded once by a text encoder and kept in a memory-mapped file."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..files import read_or_write, safetensors_header, whole_file
from ..texts import NULL_TEXT, encode_texts, text_length

# version of the files; increase it if the same texts give other values
CACHE_VERSION = 1
_BATCH = 64
_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class TextTable:
    """Embedded texts without their padding; the first text is the empty one, the null condition.

    - `tokens`: float32 `(T, D)`, the tokens of all texts in sequence; `offsets`: int64 `(U + 1,)`, where each begins.
    - `length`: the number of tokens to which texts are padded.
    - `fingerprint`: hash of the encoder, the tokenizer and the texts.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    length: int
    fingerprint: str

    def rows(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The texts `index`, `(B,)`: tokens `(B, length, D)`, padded with 0, and their mask, int64 `(B, length)`."""
        starts, stops = self.offsets[index], self.offsets[index + 1]
        hidden = torch.zeros(len(index), self.length, self.tokens.shape[1])
        mask = torch.zeros(len(index), self.length, dtype=torch.int64)
        for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            hidden[i, : stop - start], mask[i, : stop - start] = self.tokens[start:stop], 1
        return hidden, mask


def read_captions(rows: Any, column: str, where: str) -> list[list[str]]:
    """The captions of each row of a column of strings, or of lists of strings.

    Raises: `ValueError`, with the row, for a missing column, and for rows without a caption.
    """
    if column not in rows.column_names:
        raise ValueError(f"{where} has no column {column!r}; its columns are {rows.column_names}.")
    captions = []
    for i, value in enumerate(rows[column][:]):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"column {column!r} of {where} must have a text, or a list of texts, in each row, got {value!r} in "
                f"row {i}; an empty text means that there is no caption."
            )
        captions.append(texts)
    return captions


def embed_captions(
    text_encoder: Any,
    tokenizer: Any,
    captions: Sequence[Sequence[str]],
    folder: str | Path,
    progress_bar: bool = True,
) -> tuple[TextTable, tuple[tuple[int, ...], ...]]:
    """Embeds each different caption, or reads them from the file of an earlier call.

    Args:
        text_encoder, tokenizer: see [`encode_texts`].
        captions: the texts of each image.
        folder (`str` or `Path`): where the file is; its name is a hash of everything that the values depend on.
        progress_bar (`bool`, defaults to `True`): show a tqdm bar.

    Returns: the table, and the numbers of the texts of each image in it.
    """
    texts = list(dict.fromkeys([NULL_TEXT, *(text for each in captions for text in each)]))
    number = {text: i for i, text in enumerate(texts)}
    indices = tuple(tuple(number[text] for text in each) for each in captions)
    length = text_length(text_encoder, tokenizer)
    digest = hashlib.blake2b(digest_size=16)
    for part in (str(CACHE_VERSION), str(length), _tokenizer_json(tokenizer), _config_json(text_encoder)):
        digest.update(part.encode())
    for name, value in sorted(text_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for text in texts:
        digest.update(struct.pack("<q", len(text)) + text.encode())
    key = digest.hexdigest()
    path = Path(folder) / f"{key}.safetensors"
    table = read_or_write(
        path,
        "the embedded captions",
        lambda _: _read(path, length, key),
        lambda: _write(path, text_encoder, tokenizer, texts, length, progress_bar),
    )
    return table, indices


def _config_json(text_encoder: Any) -> str:
    """The class and the config of an encoder, without what saving or loading it writes into the config."""
    config = text_encoder.config.to_dict()
    kept = {name: value for name, value in config.items() if name not in _NOT_OF_THE_MODEL}
    return type(text_encoder).__name__ + json.dumps(kept, sort_keys=True, default=str)


def _tokenizer_json(tokenizer: Any) -> str:
    """Everything that a fast tokenizer does, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()


def _read(path: Path, length: int, key: str) -> TextTable | None:
    """The table of a file, memory-mapped; `None` if there is none, or a damaged one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return TextTable(file.get_tensor("tokens"), file.get_tensor("offsets").clone(), length, key)
    except (SafetensorError, OSError):
        return None


def _write(
    path: Path, text_encoder: Any, tokenizer: Any, texts: Sequence[str], length: int, progress_bar: bool
) -> None:
    """Writes the file batch by batch, so that it may be larger than the memory."""
    counts = []
    for start in range(0, len(texts), _BATCH):
        part = tokenizer(list(texts[start : start + _BATCH]), truncation=True, max_length=length)
        counts += [len(tokens) for tokens in part.input_ids]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    total, size = int(offsets[-1]), int(encode_texts(text_encoder, tokenizer, [NULL_TEXT])[0].shape[-1])
    header = safetensors_header({"offsets": ("I64", offsets.shape), "tokens": ("F32", (total, size))}, None)
    with whole_file(path) as file:
        file.write(header)
        file.write(offsets.numpy().tobytes())
        starts = range(0, len(texts), _BATCH)
        for start in tqdm(starts, desc="embedding captions", unit="batch", disable=not progress_bar, leave=False):
            hidden, mask = encode_texts(text_encoder, tokenizer, texts[start : start + _BATCH])
            for row, counted in zip(hidden, mask.bool(), strict=True):
                file.write(row[counted].cpu().contiguous().numpy().tobytes())


@functools.lru_cache(maxsize=1)
def load_text_encoder(name: str) -> tuple[Any, Any]:
    """The text encoder and the tokenizer of a folder or a repository of transformers, in evaluation mode.

    Only safetensors are read, and no code is run. T5 and its like give their encoder, CLIP its text model.

    Raises: `ValueError` if transformers is not installed; `OSError`, `ValueError` for other folders.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("captions need transformers, which is not installed: pip install transformers") from None
    shared: Any = {"trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(name, **shared)
    if config.model_type == "clip":  # both towers; AutoModelForTextEncoding knows only the text model alone
        encoder: Any = transformers.CLIPTextModel.from_pretrained(name, use_safetensors=True)
    else:
        encoder = transformers.AutoModelForTextEncoding.from_pretrained(name, use_safetensors=True, **shared)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **shared)
    return encoder.eval().requires_grad_(False), tokenizer
