"""Tensors that tests draw from fixed seeds, and a record of the tensors that an operation makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

F64 = torch.float64


def f64(value) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def normal_from(generator: torch.Generator, *shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    """The next standard normal numbers of a generator."""
    return torch.randn(shape, generator=generator, dtype=dtype)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    """Uniform numbers in [0, 1), the same for the same seed."""
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def signs(*shape: int, seed: int = 0) -> torch.Tensor:
    """±1 at random, in float32, the same for the same seed."""
    return 2.0 * torch.randint(0, 2, shape, generator=seeded(seed)) - 1


def random_levels(*shape: int, num_levels: int = 256, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Integers in `[0, num_levels)`, the same for the same seed."""
    return torch.randint(0, num_levels, shape, generator=seeded(seed), dtype=dtype)


class TensorSizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns, in `sizes`."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        self.sizes.extend(tensor.numel() for tensor in outputs if torch.is_tensor(tensor))
        return result
