"""Models whose weights are all there: diffusers fills what a file lacks with random numbers, and warns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging


class WholeModelMixin(ModelMixin):
    """A `ModelMixin` that is loaded from a file with exactly its tensors, or not at all."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any):
        """As [`ModelMixin.from_pretrained`].

        Raises: `ValueError`, besides what that one raises, for weights that lack a tensor or have one too many: they
            are not of the network that `config.json` describes, and what it computes would be noise.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for kind, fault in (("missing_keys", "lack"), ("unexpected_keys", "have too many, for")):
            names = sorted(info.get(kind, ()))
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(
                    f"the weights in {pretrained_model_name_or_path} must be those of its config.json, a "
                    f"{cls.__name__}; they {fault} {', '.join(names[:3])}{more}: they are damaged, or another model's."
                )
        return (model, info) if wants_info else model

    def to(self, *args: Any, **kwargs: Any):
        """As [`ModelMixin.to`], without its warning of a cast of what has to stay float32: ours stays so."""
        with _without_warning_of_casts():
            return super().to(*args, **kwargs)


@contextmanager
def _without_warning_of_casts() -> Iterator[None]:
    """Diffusers logs it at every cast, also of models without such modules (0.42.1: "kept in float32: []")."""
    of_casts = logging.get_logger(ModelMixin.__module__)

    def other(record: Any) -> bool:
        return "should be kept in float32" not in str(record.msg)

    of_casts.addFilter(other)
    try:
        yield
    finally:
        of_casts.removeFilter(other)
