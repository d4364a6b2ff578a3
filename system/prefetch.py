"""A thread that runs an iterator ahead of whoever reads it."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def prefetch(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Run an iterator `depth` items ahead in a thread. Its errors are raised here; closing this iterator ends the thread."""
    end, thread = object(), ThreadPoolExecutor(1, "data prefetch")
    try:
        ahead = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
