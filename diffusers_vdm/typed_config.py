"""The type of diffusers' `config`, which its annotation calls a plain dictionary."""

from typing import TYPE_CHECKING, Any


class TypedConfig:
    """First base of our components, for type checkers alone: `config` also has each argument as an attribute."""

    if TYPE_CHECKING:

        @property
        def config(self) -> Any: ...
