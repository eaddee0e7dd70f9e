"""What a running answer wants next, as a generator of steps: text out, evaluations in.

An answer that is written this way does not care who carries its steps out: ``pieces`` here, for one
answer alone, or a crew (crew.py), which evaluates the tokens of several answers together. A step
that fails is thrown into the generator where it was asked for. Nothing here waits for turns.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medmo_edge.runtime.backends import Backend

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decode:
    """Evaluate ``token`` at the end of the answer; answered by the logits [V] after it."""

    token: int


@dataclass(frozen=True, slots=True)
class Encode:
    """A chance to encode pixels [H, W, 3] while others go on.

    Answered by what ``Lanes.encode_aside`` gives, or by None: then it is not done yet.
    """

    resized_HWC: NDArray[np.uint8]


class Pause(Enum):
    """A point where others may go on; answered by None."""

    PROMPT = "the next step evaluates a piece of the prompt"
    SHARED = "another answer is evaluating the same images"


#: text that became final, or a wish
Step = str | Decode | Encode | Pause
Steps = Generator[Step, Any, T]


def pieces(backend: Backend, steps: Steps[T]) -> Generator[str, None, T]:
    """Carry out the steps of one answer that has the backend for itself; yields its text.

    Errors: what ``steps`` raises.
    """
    resume: Callable[[], Step] = partial(next, steps)
    try:
        while True:
            try:
                step = resume()
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, str):
                yield step
            try:
                resume = partial(steps.send, _carry_out(backend, step))
            except BaseException as error:
                resume = partial(steps.throw, error)
    finally:
        steps.close()


def _carry_out(backend: Backend, step: Step) -> NDArray[np.float32] | None:
    if isinstance(step, Decode):
        return backend.decode_tokens([step.token])
    return None
