"""Texts as conditions: the tokens of a text, embedded by an encoder of transformers, and a mask of those that count.

Any encoder with `last_hidden_state` will do, such as the text models of CLIP and T5. All texts are padded to one
length, `text_length`, and the network sees none of the padding. Text without any content is the null condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import logging

logger = logging.get_logger(__name__)

# more tokens than this are cut off, as in pipelines with CLIP
MAX_TOKENS = 77
NULL_TEXT = ""


def text_length(text_encoder: Any, tokenizer: Any) -> int:
    """The number of tokens of each text: what tokenizer and encoder can take, and at most [`MAX_TOKENS`]."""
    positions = getattr(text_encoder.config, "max_position_embeddings", None) or MAX_TOKENS
    return int(min(MAX_TOKENS, positions, tokenizer.model_max_length))


def check_texts(name: str, value: Any) -> list[str]:
    """`value` as a list; raises `TypeError` or `ValueError` unless it is a string or a list of at least one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of strings, got {type(value).__name__}.")
    if not texts:
        raise ValueError(f"{name} must be at least one string, got an empty list.")
    return list(texts)


@torch.no_grad()
def encode_texts(text_encoder: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedded tokens of texts, `(N, L, D)` in float32, 0 where there is padding, and their mask `(N, L)`, int64.

    Args:
        text_encoder (`transformers.PreTrainedModel`): returns `last_hidden_state`, `(N, L, D)`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): of the encoder; text that is too long is cut, with a
            warning.
        texts (`Sequence[str]`): N texts.
    """
    length = text_length(text_encoder, tokenizer)
    tokens = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt",
        return_overflowing_tokens=False,
    )  # fmt: skip
    mask = tokens.attention_mask
    full = [text for text, row in zip(texts, mask, strict=True) if int(row.sum()) == length]
    cut = [text for text in full if len(tokenizer(text, verbose=False).input_ids) > length]
    if cut:
        logger.warning(f"{len(cut)} texts are cut off at {length} tokens, the first of them {cut[0]!r}.")
    device = next(text_encoder.parameters()).device
    output = text_encoder(tokens.input_ids.to(device), attention_mask=mask.to(device))
    hidden = output.last_hidden_state.to(torch.float32)
    return hidden * mask.to(device, torch.float32)[..., None], mask.to(device)
