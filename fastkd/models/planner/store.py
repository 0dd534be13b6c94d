"""Measured times on disk: one JSON file for each machine and installation, in the cache folder.

A damaged file counts as empty. Times that cannot be read or written are measured again in every
run. Both are said once.
"""

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

import fastkd.kernels
from fastkd.compute.machine import cpu_facts
from fastkd.errors import RunFailed
from fastkd.models.planner.spec import KINDS, Case, Choice
from fastkd.storage.atomic import atomic_path, sentence
from fastkd.storage.cache_folder import cache_folder

__all__ = ["Store", "device_class", "environment"]

_FORMAT = 1


def device_class(device: torch.device) -> str:
    """`avx2`, `avx512 bf16`, `sm_90`: devices that the same kernels run on."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    cpu = cpu_facts()
    return cpu["instructions"].lower() + (" bf16" if cpu["bf16"] else "")


def environment(device: torch.device) -> dict[str, Any]:
    """All that the times depend on beside the case; another one has another file."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_facts()["name"],
        "instructions": device_class(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": _kernels_digest(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **(_gpu_settings() if on_gpu else _cpu_settings()),
    }


def _cpu_settings() -> dict[str, Any]:
    """What decides how torch convolves."""
    mkldnn: Any = torch.backends.mkldnn
    return {"mkldnn": mkldnn.enabled, "fp32": mkldnn.conv.fp32_precision}


def _gpu_settings() -> dict[str, Any]:
    """What decides which algorithms cuDNN and Triton run."""
    cudnn: Any = torch.backends.cudnn
    cuda: Any = torch.backends.cuda
    return {
        "cudnn": cudnn.version() if cudnn.enabled else None,
        "cudnn benchmark": cudnn.benchmark,
        "cudnn deterministic": cudnn.deterministic,
        "fp32": [cudnn.conv.fp32_precision, cuda.matmul.fp32_precision],
        "triton": version("triton") if find_spec("triton") else None,
    }


@functools.cache
def _kernels_digest() -> str:
    """Of the sources of the op and of the compiled core."""
    folder = Path(fastkd.kernels.__file__).parent
    files = [*(folder / "grouped_pointwise").rglob("*.*"), *folder.glob("*.so")]
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.suffix in (".py", ".so"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """The choices of one environment, by the key of their case.

    folder  where the file lies; None: in the cache folder of the user
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.environment = environment(device)
        digest = hashlib.sha256(json.dumps(self.environment, sort_keys=True).encode()).hexdigest()
        self.path = (folder or cache_folder()) / f"block-times-{digest[:16]}.json"

    def get(self, case: Case) -> Choice | None:
        """What was chosen before, or None."""
        found = self._read().get(case.key)
        return None if found is None else Choice(found["kind"], found["ms"], "disk")

    def put(self, case: Case, choice: Choice) -> None:
        """Keep a choice, beside those that other processes have added meanwhile."""
        entries = self._read() | {case.key: {"kind": choice.kind, "ms": dict(choice.ms)}}
        content = {"format": _FORMAT, "environment": self.environment, "choices": entries}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as beside:
                beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        except (OSError, RunFailed) as error:
            why = sentence(error, self.path) if isinstance(error, OSError) else error
            _say(
                f"measured times of blocks are not kept, every run measures them: {why}. "
                "FASTKD_CACHE names another folder"
            )

    def _read(self) -> dict[str, Any]:
        """The valid entries of the file; what is damaged is left out."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            _say(f"times of blocks are measured again: {sentence(error)}")
            return {}
        except ValueError:
            content = None
        entries = _entries(content, self.environment)
        if entries is None:
            _say(f"{self.path} is damaged; its times of blocks are measured again")
        return entries or {}


def _entries(content: Any, environment: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entries of a file that is as `Store.put` writes it, else None."""
    if not isinstance(content, dict):
        return None
    content = cast(dict[str, Any], content)
    if content.get("format") != _FORMAT or content.get("environment") != environment:
        return None
    entries = content.get("choices")
    if not isinstance(entries, dict):
        return None
    return entries if all(map(_valid, cast(dict[str, Any], entries).values())) else None


def _valid(entry: Any) -> bool:
    match entry:
        case {"kind": str(kind), "ms": {**ms}}:
            return kind in KINDS and set(ms) == set(KINDS) and all(map(_is_time, ms.values()))
    return False


def _is_time(ms: Any) -> bool:
    return isinstance(ms, float) and math.isfinite(ms) and ms > 0


@functools.cache
def _say(words: str) -> None:
    """Each sentence once."""
    warnings.warn(words, stacklevel=2)
