"""What this machine is: processor, memory, CUDA GPUs, Jetson; read from the system itself.

Everything is best effort: a fact that cannot be read is empty or None, never an error. It does not
measure speed, and it asks the CUDA driver directly, so no GPU package is needed.
"""

import ctypes
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Features that decide which CPU kernels a backend can use, by their names in /proc/cpuinfo.
_FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
    "amx": "amx_tile",
    "neon": "asimd",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "sve": "sve",
    "bf16": "bf16",
}
LIBRARIES = (
    "cuda-bindings",
    "llama-cpp-python",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "pydicom",
    "tensorrt",
    "tensorrt-rtx",
    "tokenizers",
)
_DPKG = "/var/lib/dpkg/status"
_NVIDIA = "/proc/driver/nvidia/version"
_CU_MAJOR, _CU_MINOR = 75, 76  # cuDeviceGetAttribute: compute capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """One GPU as the driver reports it; ``sm`` is the compute capability times ten (90 = 9.0)."""

    name: str
    sm: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Jetson:
    """An NVIDIA Jetson module and its Linux for Tegra release.

    ``jetpack``: as its package says ("6.2"), else the major version that the release belongs to.
    """

    model: str
    l4t: str
    jetpack: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """This machine. ``cores``: physical cores this process may use; memory after cgroup limits.

    ``driver``: release of the NVIDIA kernel driver; ``cuda_version``: newest CUDA it supports.
    """

    system: str
    cpu: str
    cores: int
    features: tuple[str, ...]
    ram_bytes: int
    ram_available_bytes: int
    cuda: tuple[Cuda, ...]
    jetson: Jetson | None
    driver: str | None = None
    cuda_version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def probe() -> Device:
    """Look at the machine; takes a few milliseconds, more when a CUDA driver has to start."""
    info = _text("/proc/cpuinfo")
    total, available = _memory()
    gpus, cuda_version = _cuda()
    return Device(
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(info),
        cores=_physical_cores(info),
        features=_features(info),
        ram_bytes=total,
        ram_available_bytes=available,
        cuda=gpus,
        jetson=_jetson(),
        driver=_driver(),
        cuda_version=cuda_version,
    )


def cpu_features() -> tuple[str, ...]:
    """What the processor can do that a backend may care for; () where the system does not say."""
    return _features(_text("/proc/cpuinfo"))


def cuda_devices() -> tuple[Cuda, ...]:
    """The CUDA GPUs alone; none without a driver."""
    return _cuda()[0]


def library_versions() -> dict[str, str | None]:
    """Installed versions of the libraries a runtime may use, without importing them."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def release_numbers(version: str, count: int) -> tuple[int, ...]:
    """The first ``count`` numbers of a version, to be compared: "1.31.1rc1" gives (1, 31) for 2."""
    numbers = []
    for part in version.split(".")[:count]:
        digits = "".join(character for character in part if character.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").replace("\0", "")
    except OSError:
        return ""


def _cpu_name(info: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _features(info: str) -> tuple[str, ...]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return tuple(name for name, flag in _FEATURES.items() if flag in flags)


def _physical_cores(info: str) -> int:
    """Physical cores among those this process may run on, at most what its cgroup may use."""
    allowed = _allowed_cpus()
    cores = set()
    for block in info.split("\n\n"):
        fields = dict(re.findall(r"^(processor|physical id|core id)\s*:\s*(\d+)$", block, re.M))
        if "core id" in fields and int(fields["processor"]) in allowed:
            cores.add((fields.get("physical id"), fields["core id"]))
    count = len(cores) or len(allowed)
    quota = _cpu_quota()
    return max(1, min(count, int(quota) if quota else count))


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _cpu_quota() -> float | None:
    """CPUs granted by a container limit (cgroup v2 or v1), else None."""
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if not period:
        quota = _text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
        period = _text("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        return int(quota) / int(period)
    return None


def _memory() -> tuple[int, int]:
    """(total, available) bytes, both cut to the container's limit."""
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE))
    total = int(info.get("MemTotal", 0)) << 10 or _memory_by_sysconf()
    available = int(info["MemAvailable"]) << 10 if "MemAvailable" in info else total
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, used = _text(limit_path).strip(), _text(used_path).strip()
        if limit.isdecimal() and used.isdecimal() and int(limit) < total:
            total = int(limit)
            # Page cache counts as used here but can be dropped: this errs on the careful side.
            available = min(available, max(0, int(limit) - int(used)))
    return total, available


def _memory_by_sysconf() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _driver() -> str | None:
    """``NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ...``; None without one."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", _text(_NVIDIA), re.MULTILINE)
    return found[1] if found else None


def _cuda() -> tuple[tuple[Cuda, ...], str | None]:
    """GPUs and CUDA version through the driver's own library; none when there is no GPU."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return (), None
    count, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return (), None
    gpus = (_cuda_device(driver, index) for index in range(count.value))
    known = driver.cuDriverGetVersion(ctypes.byref(version)) == 0
    text = f"{version.value // 1000}.{version.value % 1000 // 10}" if known else None
    return tuple(gpu for gpu in gpus if gpu), text


def _cuda_device(driver: ctypes.CDLL, index: int) -> Cuda | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CU_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CU_MINOR, device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    if failed:
        return None
    return Cuda(
        name=name.value.decode(errors="replace"),
        sm=10 * major.value + minor.value,
        memory_bytes=memory.value,
    )


def _jetson() -> Jetson | None:
    """From the device tree and /etc/nv_tegra_release (``# R36 (release), REVISION: 4.3, ...``)."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text("/etc/nv_tegra_release"))
    if found is None:
        return None
    l4t = f"{found[1]}.{found[2]}"
    jetpacks = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}
    package = re.search(
        r"^Package: nvidia-jetpack\n(?:\S.*\n)*?Version: ([\d.]+)", _text(_DPKG), re.MULTILINE
    )
    return Jetson(
        model=_text("/proc/device-tree/model").strip(),
        l4t=l4t,
        jetpack=package[1] if package else jetpacks.get(found[1], ""),
    )
