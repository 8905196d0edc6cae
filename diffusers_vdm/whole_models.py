"""Models that reject incomplete weights; diffusers would only warn and initialize missing tensors randomly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging

from .typed_config import TypedConfig


class WholeModelMixin(TypedConfig, ModelMixin):
    """A `ModelMixin` that loads only files with exactly its tensors."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        """As [`ModelMixin.from_pretrained`].

        Raises: `ValueError`, besides the errors of that method, for weights with missing or unexpected tensors. Such
            weights do not belong to the network of `config.json`.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model, info = loaded
        for kind, fault in (("missing_keys", "lack"), ("unexpected_keys", "have too many, for")):
            names = sorted(info.get(kind, ()))
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(
                    f"the weights in {pretrained_model_name_or_path} must be those of its config.json, a "
                    f"{cls.__name__}; they {fault} {', '.join(names[:3])}{more}: they are damaged or of another model."
                )
        return (model, info) if wants_info else model

    def to(self, *args: Any, **kwargs: Any):  # pyright: ignore[reportIncompatibleVariableOverride]
        """As [`ModelMixin.to`], without its warning about casting float32 modules, because ours stay float32."""
        with _without_cast_warnings():
            return super().to(*args, **kwargs)


@contextmanager
def _without_cast_warnings() -> Iterator[None]:
    """Diffusers 0.42.1 logs the warning at every cast, even of models without such modules ("kept in float32: []")."""
    logger = logging.get_logger(ModelMixin.__module__)

    def keep(record: Any) -> bool:
        return "should be kept in float32" not in str(record.msg)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
