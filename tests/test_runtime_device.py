"""The device probe on made-up machines, and that it never fails on this one."""

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from medmo_edge.runtime import device
from medmo_edge.runtime.device import Cuda, Device, Jetson, library_versions, probe

TWO_SOCKETS = """\
processor\t: 0
model name\t: Example CPU @ 2.00GHz
physical id\t: 0
core id\t: 0
flags\t: fpu avx2 fma avx512f avx512_vnni

processor\t: 1
physical id\t: 0
core id\t: 0

processor\t: 2
physical id\t: 0
core id\t: 1

processor\t: 3
physical id\t: 1
core id\t: 0
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 62.50
Features\t: fp asimd asimddp i8mm bf16 sve
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty machine; tests put its files here."""
    files: dict[str, str] = {}
    monkeypatch.setattr(device, "_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(device, "_allowed_cpus", lambda: {0, 1, 2, 3})
    return files


def test_probing_this_machine_gives_json_values() -> None:
    found = probe()
    assert found.cores >= 1
    assert found.cpu
    assert 0 < found.ram_available_bytes <= found.ram_bytes
    assert json.loads(json.dumps(found.to_dict()))["system"] == found.system


def test_a_machine_that_tells_nothing(machine: dict[str, str]) -> None:
    found = probe()
    assert isinstance(found, Device)
    assert (found.cores, found.features, found.jetson) == (4, (), None)


def test_hyperthreads_are_not_cores(machine: dict[str, str]) -> None:
    machine["/proc/cpuinfo"] = TWO_SOCKETS
    found = probe()
    assert found.cpu == "Example CPU @ 2.00GHz"
    assert found.cores == 3
    assert found.features == ("avx2", "fma", "avx512", "avx512_vnni")


def test_cores_of_other_processes_do_not_count(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["/proc/cpuinfo"] = TWO_SOCKETS
    monkeypatch.setattr(device, "_allowed_cpus", lambda: {1, 3})
    assert probe().cores == 2


@pytest.mark.parametrize(("limit", "cores"), [("150000 100000", 1), ("250000 100000", 2)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_container_may_use_fewer_cores(
    version: int, limit: str, cores: int, machine: dict[str, str]
) -> None:
    machine["/proc/cpuinfo"] = TWO_SOCKETS
    quota, period = limit.split()
    if version == 2:
        machine["/sys/fs/cgroup/cpu.max"] = limit + "\n"
    else:
        machine["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = quota
        machine["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = period
    assert probe().cores == cores


def test_no_container_limit(machine: dict[str, str]) -> None:
    machine["/proc/cpuinfo"] = TWO_SOCKETS
    machine["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    machine["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1"
    machine["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000"
    assert probe().cores == 3


def test_a_container_may_use_less_memory(machine: dict[str, str]) -> None:
    machine["/proc/meminfo"] = "MemTotal:  8000000 kB\nMemAvailable:  6000000 kB\n"
    assert probe().ram_bytes == 8000000 << 10
    assert probe().ram_available_bytes == 6000000 << 10
    machine["/sys/fs/cgroup/memory.max"] = str(1 << 30)
    machine["/sys/fs/cgroup/memory.current"] = str(3 << 28)
    assert probe().ram_bytes == 1 << 30
    assert probe().ram_available_bytes == 1 << 28
    machine["/sys/fs/cgroup/memory.max"] = "max"
    assert probe().ram_available_bytes == 6000000 << 10


def test_arm_and_jetson(machine: dict[str, str]) -> None:
    machine["/proc/cpuinfo"] = ARM
    machine["/proc/device-tree/model"] = "NVIDIA Jetson AGX Orin Developer Kit"
    machine["/etc/nv_tegra_release"] = (
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    )
    found = probe()
    assert found.features == ("neon", "dotprod", "i8mm", "sve", "bf16")
    assert found.jetson == Jetson(
        model="NVIDIA Jetson AGX Orin Developer Kit", l4t="36.4.3", jetpack="6"
    )
    machine["/var/lib/dpkg/status"] = (
        "Package: nvidia-jetpack-dev\nVersion: 1.0\n\n"
        "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2+b77\n\n"
        "Package: zlib1g\nVersion: 1.3\n"
    )
    assert probe().jetson == Jetson(
        model="NVIDIA Jetson AGX Orin Developer Kit", l4t="36.4.3", jetpack="6.2"
    )


def test_the_kernel_driver_tells_its_release(machine: dict[str, str]) -> None:
    assert probe().driver is None
    machine["/proc/driver/nvidia/version"] = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
        "GCC version:  gcc version 13.3.0\n"
    )
    assert probe().driver == "580.65.06"


class _Driver:
    """The CUDA driver of a machine with one GPU; ``fail`` names a call that returns an error."""

    def __init__(self, fail: str = "") -> None:
        self._fail = fail

    def __getattr__(self, name: str) -> Any:
        return lambda *args: 100 if name == self._fail else self._answer(name, args)

    @staticmethod
    def _answer(name: str, args: tuple[Any, ...]) -> int:
        if name == "cuDeviceGetName":
            args[0].value = b"Example GPU"
        elif name == "cuDeviceGetCount":
            args[0]._obj.value = 1
        elif name == "cuDeviceGetAttribute":
            args[0]._obj.value = {75: 8, 76: 7}[args[1]]
        elif name == "cuDriverGetVersion":
            args[0]._obj.value = 12060
        elif name == "cuDeviceTotalMem_v2":
            args[0]._obj.value = 64 << 30
        return 0


def test_gpus_are_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver())
    found = probe()
    assert found.cuda == (Cuda(name="Example GPU", sm=87, memory_bytes=64 << 30),)
    assert found.cuda_version == "12.6"


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount", "cuDeviceGetAttribute"])
def test_a_driver_that_fails_means_no_gpu(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver(fail=call))
    assert probe().cuda == ()


def test_library_versions_need_no_import() -> None:
    import numpy

    found = library_versions()
    assert found["numpy"] == numpy.__version__
    assert "tensorrt" in found
    assert Path(numpy.__file__).exists()
