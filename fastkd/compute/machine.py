"""What this machine and this installation are: processor, GPUs, versions, kernels.

`fastkd doctor` prints these facts, and every run folder keeps them. A broken package must not break
the report, so probes catch whatever an import may raise and report it in place.
"""

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from fastkd.compute.precision import computes_in_bf16
from fastkd.printable import in_words

__all__ = [
    "cpu_facts",
    "cpu_quota",
    "environment",
    "gpu_facts",
    "keep_to_quota",
    "kernel_facts",
    "version_of",
]


def version_of(name: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_facts() -> dict[str, Any]:
    """Name, cores, torch's threads, vector instructions, and whether bf16 is computed natively."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "name": capabilities.get("cpu_name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": computes_in_bf16(torch.device("cpu")),
    }


def keep_to_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> None:
    """No more threads than a container may use cores, unless OMP_NUM_THREADS says how many.

    torch counts the cores of the machine; threads beyond the quota spin while they wait for each
    other, and the quota pays for it.
    """
    quota = cpu_quota(cgroup)
    if quota and quota < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(quota)


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores that the container's limit amounts to, rounded up; None without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((cgroup / name).read_text(encoding="ascii") for name in names).split()
            quota, period = map(int, words)
        except (OSError, ValueError):
            continue  # no such file, or "max"
        if quota > 0 and period > 0:
            return max(1, -(-quota // period))
    return None


def gpu_facts() -> list[dict[str, Any]]:
    """Name, compute capability and memory of every CUDA device that torch sees."""
    if not torch.cuda.is_available():
        return []
    # torch exports no type for the properties of a device.
    properties = cast(Callable[[int], Any], torch.cuda.get_device_properties)  # pyright: ignore[reportUnknownMemberType]
    return [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
        }
        for gpu in map(properties, range(torch.cuda.device_count()))
    ]


def kernel_facts() -> dict[str, Any]:
    """`fastkd.kernels.status()`, or why it is not available."""
    try:
        return dict(importlib.import_module("fastkd.kernels").status())
    except (Exception, SystemExit) as error:
        return {"error": in_words(error)}


def environment() -> dict[str, Any]:
    """What a reader of the results needs to know about machine and software, for JSON."""
    import fastkd

    return {
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "torchvision", "timm", "triton", "numpy")},
        "system": platform.platform(),
        "cpu": cpu_facts(),
        "gpus": gpu_facts(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "kernels": kernel_facts(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
