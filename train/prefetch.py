"""What coming steps need, made in the background while a step is learned from.

It knows neither data nor model: ``draw`` must be a pure function of the step.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(draw: Callable[[int], T], steps: range, threads: int) -> Iterator[T]:
    """``draw`` of every step in order, the next ``threads`` being made in the background."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(draw, step) for step in steps[:threads]]
        try:
            for step in steps:
                if step + threads in steps:
                    waiting.append(pool.submit(draw, step + threads))
                yield waiting.pop(0).result()
        finally:
            for one in waiting:
                one.cancel()
