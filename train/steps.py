"""The loop around the steps of a stage: log, save, resume, stop, and end well when something fails.

What one step does is given as a function of its number, which must depend on nothing else but the
weights: then a run that was killed anywhere and resumed learns exactly what an uninterrupted one
does. Saved steps have one form however many processes wrote them (torch's distributed checkpoint)
and hold only what learns; frozen weights come from the base again.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmo_edge.errors import RecipeError, UsageError
from medmo_edge.train.interrupt import stop_requests
from medmo_edge.train.parallel import Group
from medmo_edge.train.state import complete_steps, new_step, newest_step
from medmo_edge.train.step_log import StepLog
from medmo_edge.train.steps_bar import step_bar

Learn = Callable[[int], Mapping[str, float]]

_SHOWN = ("loss", "reward")  # beside the progress bar
_STATE = "state"


class Diverged(Exception):
    """Raised by a step in all processes, before it changes a weight; ``str`` says what is wrong."""


@dataclass(slots=True, kw_only=True)
class StepLoop:
    """Steps 0 to ``total`` of one stage in ``folder``.

    ``model`` is the one within DDP's wrapper, ``optimizer`` moves its parameters. ``identity`` is
    a hash of all that may not change when resuming. ``after_save`` is called by every process after
    each save, for what a caller wants to keep beside.
    """

    name: str
    folder: Path
    group: Group
    model: Any
    optimizer: Any
    total: int
    save_every: int
    identity: str
    seed: int
    step: int = 0
    after_save: Callable[[], None] = lambda: None
    _log: StepLog | None = field(default=None, repr=False)

    def resume(self) -> int:
        """Go back to the newest whole step, if there is one; gives the step to do next.

        Errors: UsageError when it was trained with other settings.
        """
        found = newest_step(self.folder, self.identity) if self.folder.is_dir() else None
        if found is not None:
            mark, folder = found
            _load(self.model, self.optimizer, folder / _STATE, self.group)
            self.step = int(mark["step"])
        return self.step

    def run(self, learn: Learn) -> None:
        """Do the steps that are left.

        Ctrl-C finishes and saves the step, then raises KeyboardInterrupt. Errors: RecipeError when
        a step cannot be done (loss not finite, device full), UsageError when the disk is full; both
        name the step that a resumed run goes on from.
        """
        if self.group.leads:
            self._log = StepLog.open(self.folder, self.name, self.step)
        try:
            with stop_requests() as stop, step_bar(self.step, self.total) as show:
                while self.step < self.total:
                    metrics = self._one(learn)
                    if self.group.leads:
                        show(self.step, {name: metrics[name] for name in _SHOWN if name in metrics})
                    self._keep(bool(self.group.total([float(stop.is_set())])[0]))
        finally:
            if self._log is not None:
                self._log.close()

    def _one(self, learn: Learn) -> Mapping[str, float]:
        import torch

        torch.manual_seed(hash((self.seed, self.step, self.group.rank)) % 2**63)
        started = time.perf_counter()
        try:
            metrics = dict(learn(self.step))
        except Diverged as problem:
            if self.step:  # the weights are still those of the last good step
                self.save()
            raise RecipeError(
                f"{self.name}, step {self.step}: {problem}: lower learning_rate or put those "
                f"samples right; {self._where_to_go_on()}"
            ) from problem
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"{self.name}, step {self.step}: {self.group.device} is out of memory: lower "
                f"row_tokens or max_pixels, or shard over more devices; {self._where_to_go_on()}"
            ) from error
        metrics["seconds"] = time.perf_counter() - started
        if self._log is not None:
            with self._disk("logged"):
                self._log.write(self.step, metrics)
        self.step += 1
        return metrics

    def _keep(self, stops: bool) -> None:
        if stops or self.step % self.save_every == 0 or self.step == self.total:
            self.save()
        if stops and self.step < self.total:
            raise KeyboardInterrupt(f"stopped at step {self.step}: go on with --resume")

    def save(self) -> None:
        """Write the state before the next step. Errors: UsageError when the disk is full."""
        mark = {
            "step": self.step,
            "recipe_sha256": self.identity,
            "processes": self.group.world,
        }
        group = self.group
        with (
            self._disk("saved"),
            new_step(self.folder, self.step, mark, leads=group.leads, wait=group.wait) as folder,
        ):
            _save(self.model, self.optimizer, folder / _STATE, group)
        with self._disk("drawn"):
            if self._log is not None:
                self._log.draw()
            self.after_save()

    def _disk(self, what: str) -> "_Disk":
        return _Disk(f"{self.name}, step {self.step} cannot be {what}", self._where_to_go_on)

    def _where_to_go_on(self) -> str:
        steps = complete_steps(self.folder)
        return f"--resume goes on from {steps[-1].name}" if steps else "no step is saved yet"


@dataclass(frozen=True, slots=True)
class _Disk:
    """A block that writes: what fails in it becomes one line, whatever library raised it."""

    problem: str
    where_to_go_on: Callable[[], str]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        reason = _disk_reason(error)
        if reason is not None:
            raise UsageError(
                f"{self.problem} ({reason}): free some space; {self.where_to_go_on()}"
            ) from error


def _disk_reason(error: BaseException | None) -> str | None:
    """Why the system refused to write, found within what torch wraps around it; else None."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
        return next((r for f in failures if (r := _disk_reason(f)) is not None), None)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
        return "the file could not be written whole"
    return _disk_reason(error.__cause__) if error is not None and error.__cause__ else None


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=False)


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    """What learns, and the optimiser's moments, by the names of a single unsharded model."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer, options=_options())
    return {"model": weights, "optimizer": moments}


def _save(model: Any, optimizer: Any, folder: Path, group: Group) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = FileSystemWriter(str(folder))  # which syncs its files
    with _alone_is_fine():
        state = _state(model, optimizer)
        save(state, storage_writer=writer, no_dist=group.world == 1)


def _load(model: Any, optimizer: Any, folder: Path, group: Group) -> None:
    """Weights and moments of a saved step; learning rate and decay stay those of the recipe."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    kept = [
        {name: value for name, value in one.items() if name != "params"}
        for one in optimizer.param_groups
    ]
    reader = FileSystemReader(str(folder))
    state = _state(model, optimizer)
    stored = reader.read_metadata().state_dict_metadata
    moments = state["optimizer"]["state"]
    for name in [one for one in moments if f"optimizer.state.{one}.step" not in stored]:
        del moments[name]  # nothing has moved it yet
    with _alone_is_fine():
        load(state, storage_reader=reader, no_dist=group.world == 1)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(),
    )
    for one, settings in zip(optimizer.param_groups, kept, strict=True):
        one.update(settings)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns of a single process even when it is told of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield
