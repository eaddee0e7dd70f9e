"""Two processes on a CPU (gloo, torchrun): DDP and FSDP2 learn what one process learns."""

import importlib
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from stage_data import write_data, write_recipe

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.errors import UsageError
from medmo_edge.train.parallel import Group, joined
from medmo_edge.train.stage_run import run_stages
from medmo_edge.train.step_log import read_metrics

# Runs recipes in this process of two, and says what each held while it learned.
SCRIPT = """
import contextlib, json, sys
from pathlib import Path
import torch
from medmo_edge.train import stage_run

folder, base = Path(sys.argv[1]), sys.argv[2]
real = stage_run._supervise

def spy(prepared):
    held = whole = 0
    for one in prepared.base.model.parameters():
        held += (one.to_local() if hasattr(one, "to_local") else one).numel()
        whole += one.numel()
    seen = {"world": torch.distributed.get_world_size(), "rank": prepared.group.rank,
            "call": type(prepared.call).__name__, "part": held / whole}
    name = f"{prepared.loop.folder.parent.name}-{prepared.group.rank}.json"
    (folder / name).write_text(json.dumps(seen))
    real(prepared)

stage_run._supervise = spy
with stage_run.joined() as group:  # once: torch may hang when a process joins a second time
    stage_run.joined = lambda device: contextlib.nullcontext(group)
    for name in sys.argv[3:]:
        stage_run.run_stages(folder / f"{name}.toml", folder / name, data=folder / "data",
                             stage="instruct", base=base)
"""
NAMES = ("ddp", "fsdp2", "texts")


def launch(folder: Path, base: Path, names: tuple[str, ...]) -> None:
    """``names`` one after the other in two processes that torchrun starts."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", str(script), str(folder), str(base), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tiny_untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and two with each sharding; "texts" has one picture in all of a step's rows."""
    folder = tmp_path_factory.mktemp("parallel")
    write_data(folder / "data")
    files: list[dict[str, Any]] = [
        {"path": path, "weight": 1.0, "tasks": [], "augment": "none"}
        for path in ("text-qa.jsonl", "vqa.jsonl")
    ]
    mixture = {"text_qa": 0.9, "vqa": 0.1}
    texts: dict[str, Any] = {"mixture": mixture, "data": files, "text_tokens": 40, "row_tokens": 80}
    shardings = {"one": "none", "ddp": "none", "fsdp2": "fsdp2", "texts": "fsdp2"}
    for name, sharding in shardings.items():
        more = texts if name == "texts" else {}
        path = folder / f"{name}.toml"
        write_recipe(path, tiny_untied_checkpoint, sharding=sharding, **more)
    base, data = tiny_untied_checkpoint, folder / "data"
    run_stages(folder / "one.toml", folder / "one", data=data, stage="instruct", base=base)
    launch(folder, tiny_untied_checkpoint, NAMES)
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "instruct")]


@pytest.mark.slow  # two processes load torch and transformers
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(runs: Path, name: str) -> None:
    found = losses(runs / name)
    assert len(found) == 4 and found == pytest.approx(losses(runs / "one"), rel=1e-5)
    assert found[-1] < found[0]
    one, two = (read_metrics(runs / n / "instruct") for n in ("one", name))
    for key in ("samples", "tokens", "answer_tokens", "learning_rate"):
        assert [line[key] for line in one] == [line[key] for line in two]
    assert [line["norm"] for line in one] == pytest.approx([line["norm"] for line in two], rel=1e-3)


@pytest.mark.slow
def test_there_were_two_and_each_held_its_part(runs: Path) -> None:
    wanted = {
        "ddp": ("DistributedDataParallel", 1.0),
        "fsdp2": ("FSDPQwen3VLForConditionalGeneration", 0.5),
    }
    for name, (call, part) in wanted.items():
        for rank in (0, 1):
            seen = json.loads((runs / f"{name}-{rank}.json").read_text())
            assert (seen["world"], seen["rank"], seen["call"]) == (2, rank, call)
            assert seen["part"] == pytest.approx(part, abs=0.01)


@pytest.mark.slow
def test_checkpoints_have_one_form(runs: Path) -> None:
    with open_checkpoint(runs / "one" / "instruct" / "checkpoint") as one:
        for name in ("ddp", "fsdp2"):
            with open_checkpoint(runs / name / "instruct" / "checkpoint") as two:
                assert one.tensors.keys() == two.tensors.keys()
                for tensor in one.tensors:
                    a, b = one.read(tensor), two.read(tensor)
                    assert np.allclose(a, b, atol=1e-2, rtol=1e-2), tensor
                assert [path.name for path in sorted(one.path.iterdir())] == [
                    path.name for path in sorted(two.path.iterdir())
                ]


@pytest.mark.slow
def test_a_sharded_state_is_resumed_by_one_process(
    runs: Path, tiny_untied_checkpoint: Path
) -> None:
    """Two processes saved half each; one goes on from the middle and ends at the same losses."""
    folder = runs / "fsdp2" / "instruct"
    before = losses(runs / "fsdp2")
    for name in ("step-000004", "checkpoint"):
        (folder / name).rename(folder / f"gone-{name}")
    data = runs / "data"
    run_stages(
        runs / "fsdp2.toml",
        runs / "fsdp2",
        data=data,
        stage="instruct",
        resume=True,
        base=tiny_untied_checkpoint,
    )
    assert before[:2] == losses(runs / "fsdp2")[:2]
    assert losses(runs / "fsdp2") == pytest.approx(before, rel=1e-5)


@pytest.mark.slow
def test_rows_of_text_alone_on_one_rank_do_not_hang(runs: Path) -> None:
    assert len(losses(runs / "texts")) >= 3


def test_one_process_needs_no_group() -> None:
    with joined("cpu") as group:
        assert group == Group() and group.leads
        assert group.total([1.0, 2.5]) == [1.0, 2.5]


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "64")
    with (
        pytest.raises(UsageError, match="process 64 of this machine has no GPU of"),
        joined("cuda"),
    ):
        pass


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_accelerate_reads_its_packaged_settings(name: str) -> None:
    """Every key is one that accelerate knows, and the layers it wraps exist."""
    accelerate: Any = pytest.importorskip(
        "accelerate.commands.config.config_args", reason="reads accelerate's files"
    )
    path = resources.files("medmo_edge.train") / f"accelerate-{name}.yaml"
    config = accelerate.load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and config.num_processes == 8
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3
        return
    modeling: Any = importlib.import_module("transformers.models.qwen3_vl.modeling_qwen3_vl")
    for layer in config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(","):
        assert hasattr(modeling, layer)
