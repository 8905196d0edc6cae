"""A `map` on threads that works ahead of its consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Key], Result], keys: Iterable[Key], num_workers: int, look_ahead: int
) -> Iterator[Result]:
    """`map(function, keys)` on `num_workers` threads, in order, with at most `look_ahead` calls ahead of the consumer.

    `function` must not depend on the order of the calls. An error is raised when its result is consumed. Closing the
    iterator early leaves no thread running.
    """
    pending: deque = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="in_order") as pool:
        try:
            for key in keys:
                pending.append(pool.submit(function, key))
                if len(pending) > look_ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
