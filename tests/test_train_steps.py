"""The step loop: killed anywhere it goes on as if nothing had been, and every failure is one line.

The learner here is a few numbers; whole stages are killed in test_train_stage_run.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from PIL import Image

from medmo_edge.errors import RecipeError, UsageError
from medmo_edge.train.parallel import Group
from medmo_edge.train.state import complete_steps
from medmo_edge.train.step_log import StepLog, read_metrics
from medmo_edge.train.steps import Diverged, Learn, StepLoop

TOTAL = 7


class Toy:
    """A loop over a tiny network that learns from random numbers."""

    def __init__(self, folder: Path, rate: float = 1e-2, **changes: Any) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        self.model[0].weight.requires_grad_(False)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=rate)
        settings: dict[str, Any] = {"total": TOTAL, "save_every": 2, "identity": "a", "seed": 5}
        self.loop = StepLoop(
            name="toy",
            folder=folder,
            group=Group(),
            model=self.model,
            optimizer=self.optimizer,
            **(settings | changes),
        )

    def learn(self, step: int) -> Mapping[str, float]:
        """One update on numbers of torch's own generator, which the loop seeds for each step."""
        loss = (self.model(torch.randn(16, 4)) - 1).square().mean()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return {"loss": loss.item(), "reward": -loss.item()}

    def run(self, learn: Learn | None = None) -> None:
        self.loop.resume()
        self.loop.run(learn or self.learn)

    def weights(self) -> list[float]:
        return [float(x) for p in self.model.parameters() for x in p.detach().flatten()]


def losses(folder: Path) -> dict[int, float]:
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], list[float]]:
    """Losses and weights of an uninterrupted run."""
    toy = Toy(tmp_path_factory.mktemp("whole"))
    toy.run()
    return losses(toy.loop.folder), toy.weights()


def test_a_run_leaves_metrics_curves_and_two_states(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "run")
    toy.run()
    found = losses(tmp_path / "run")
    assert len(found) == TOTAL and found[TOTAL - 1] < found[0]
    kept = [path.name for path in complete_steps(tmp_path / "run")]
    assert kept == ["step-000006", "step-000007"]
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.width > 400 and len(set(image.convert("L").tobytes())) > 2
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names - {"tensorboard"} == {"metrics.jsonl", "curves.png", *kept}


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    reader = "tensorboard.backend.event_processing.event_accumulator"
    accumulator: Any = pytest.importorskip(reader, reason="TensorBoard files need it")
    toy = Toy(tmp_path / "run")
    toy.run()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == {step: pytest.approx(loss) for step, loss in losses(tmp_path / "run").items()}


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch.distributed.checkpoint.state_dict_saver, torch.distributed.checkpoint.state_dict
import torch.utils.tensorboard, PIL.PngImagePlugin  # once, for all children
from medmo_edge.train import state, step_log
import test_train_steps as own

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at(number, real):
    calls = []
    def wrapped(*arguments, **options):
        calls.append(1)
        return die() if len(calls) == number else real(*arguments, **options)
    return wrapped

def mid_step(toy): toy.optimizer.step = at(4, toy.optimizer.step)
def after_a_step(toy): step_log.StepLog.write = at(4, step_log.StepLog.write)
def mid_save(toy): state._finish = at(2, state._finish)
def before_the_rename(toy): state.os.replace = at(3, state.os.replace)
def after_the_rename(toy): state.complete_steps = at(2, state.complete_steps)
def mid_line(toy):
    real = step_log.StepLog.write
    def torn(log, step, metrics):
        real(log, step, metrics)
        if step == 4:
            path = log.folder / "metrics.jsonl"
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - 9)
            die()
    step_log.StepLog.write = torn

for fault in (mid_step, after_a_step, mid_save, before_the_rename, after_the_rename, mid_line):
    if os.fork() == 0:
        toy = own.Toy(Path(sys.argv[1]) / fault.__name__)
        fault(toy)
        toy.run()
        os._exit(0)
    _, status = os.wait()
    print(fault.__name__, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ran to the end")
"""


def test_killed_at_any_moment_it_goes_on_with_the_same_curve(
    whole: tuple[dict[int, float], list[float]], tmp_path: Path
) -> None:
    """kill -9 within a step, within a save, at the rename, within a line of the log."""
    code = KILLED.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    faults = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert len(faults) == 6 and set(faults.values()) == {str(int(signal.SIGKILL))}, done.stderr
    for fault in faults:
        folder = tmp_path / fault
        assert len(losses(folder) if fault != "mid_line" else read_metrics(folder)) < TOTAL
        toy = Toy(folder)
        toy.run()
        assert (losses(folder), toy.weights()) == whole, fault
        assert not list(folder.glob(".step-*")), fault


def test_a_stop_is_a_request(whole: tuple[dict[int, float], list[float]], tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / number.name
        toy = Toy(folder)

        def learn(step: int, toy: Toy = toy, number: int = number) -> Mapping[str, float]:
            if step == 2:
                os.kill(os.getpid(), number)
            return toy.learn(step)

        before = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3: go on with --resume"):
            toy.run(learn)
        assert signal.getsignal(number) is before
        assert complete_steps(folder)[-1].name == "step-000003"
        again = Toy(folder)
        again.run()
        assert (losses(folder), again.weights()) == whole


def test_a_loss_that_is_no_number_stops_with_the_last_good_step(
    whole: tuple[dict[int, float], list[float]], tmp_path: Path
) -> None:
    toy = Toy(tmp_path / "run")

    def learn(step: int) -> Mapping[str, float]:
        if step == 3:
            raise Diverged("the loss is nan (samples a, b)")
        return toy.learn(step)

    message = r"^toy, step 3: the loss is nan \(samples a, b\): lower .* goes on from step-000003$"
    with pytest.raises(RecipeError, match=message):
        toy.run(learn)
    again = Toy(tmp_path / "run")
    again.run()
    assert (losses(tmp_path / "run"), again.weights()) == whole
    first = Toy(tmp_path / "at once")

    def at_once(step: int) -> Mapping[str, float]:
        raise Diverged("the loss is nan")

    with pytest.raises(RecipeError, match="no step is saved yet"):
        first.run(at_once)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files may not grow beyond ``size`` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_with_one_line_and_the_last_step_whole(
    whole: tuple[dict[int, float], list[float]], tmp_path: Path
) -> None:
    toy = Toy(tmp_path / "run")

    def learn(step: int) -> Mapping[str, float]:
        if step == 3:  # step 2 is saved
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
        return toy.learn(step)

    pattern = (
        r"^toy, step 4 cannot be saved \(.*\): free some space; --resume goes on from step-0*2$"
    )
    with disk_of(10**9), pytest.raises(UsageError, match=pattern) as caught:
        toy.run(learn)
    assert "\n" not in str(caught.value)
    assert [path.name for path in complete_steps(tmp_path / "run")] == ["step-000002"]
    assert not list((tmp_path / "run").glob(".step-*"))
    again = Toy(tmp_path / "run")
    again.run()
    assert (losses(tmp_path / "run"), again.weights()) == whole


def test_a_log_that_cannot_be_written_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    toy = Toy(tmp_path / "run")
    monkeypatch.setattr(StepLog, "write", full)
    with pytest.raises(UsageError, match=r"step 0 cannot be logged \(No space left on device\)"):
        toy.run()


def test_another_recipe_is_refused_but_another_rate_is_taken(tmp_path: Path) -> None:
    first = Toy(tmp_path / "run", total=4)
    first.run()
    with pytest.raises(UsageError, match="step-000004 was trained with another recipe"):
        Toy(tmp_path / "run", identity="b").run()
    second = Toy(tmp_path / "run", rate=1e-5)
    assert second.loop.resume() == 4
    assert second.optimizer.param_groups[0]["lr"] == 1e-5
    assert second.weights() == first.weights()


def test_frozen_weights_are_not_saved_and_states_are_small(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    toy = Toy(tmp_path / "run", total=1)
    toy.run()
    metadata = FileSystemReader(str(tmp_path / "run" / "step-000001" / "state")).read_metadata()
    names = set(metadata.state_dict_metadata)
    assert "model.0.bias" in names and "model.0.weight" not in names
    assert "optimizer.state.1.weight.exp_avg" in names


def test_out_of_memory_says_what_to_change(tmp_path: Path) -> None:
    def learn(step: int) -> Mapping[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RecipeError, match="cpu is out of memory: lower row_tokens or max_pixels"):
        Toy(tmp_path / "run").run(learn)


def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "run", total=1)

    def learn(step: int) -> Mapping[str, float]:
        return {**toy.learn(step), "reward": math.nan}

    toy.run(learn)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(line)) == {"step", "loss", "seconds"}
