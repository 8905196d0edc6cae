"""The type of `config`, which diffusers annotates as a plain dictionary."""

from typing import TYPE_CHECKING, Any


class TypedConfig:
    """First base class of our components, for type checkers only: `config` also has each argument as an attribute."""

    if TYPE_CHECKING:

        @property
        def config(self) -> Any: ...
