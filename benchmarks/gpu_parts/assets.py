"""What --assets brings to a bare machine: wheels, checkouts of peers, data archives.

What is missing is reported, never replaced. The folders RepDistiller and mdistiller are checkouts;
cifar10-jpeg.tar.xz holds cifar10/train and cifar10/test, one folder per class, and
imagenet-sample100.tar.xz photographs of full size, one folder per class.
"""

import importlib
import re
import shutil
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["UNPACKED", "lacking", "load_mdistiller_kd", "unpacked", "unpacked_wheels"]

UNPACKED = Path(tempfile.gettempdir()) / "fastkd-gpu"


def unpacked_wheels(assets: Path) -> list[str]:
    """Folders for PYTHONPATH: unpacked, because Triton reads the source of its kernels.

    Installed packages are left alone: the versions of the wheels may not fit the others here.
    """
    site = UNPACKED / "wheels"
    shutil.rmtree(site, ignore_errors=True)
    for wheel in sorted(assets.glob("*.whl")):
        if is_installed(wheel.name.partition("-")[0]):
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        print(f"== taken from the assets: {wheel.name}", flush=True)
    return [str(site)] if site.exists() else []


def lacking(root: Path) -> list[str]:
    """Packages that pyproject.toml or this program needs and no folder of sys.path has."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]]
    return [name for name in (*wanted, "fastkd", "triton", "pytest") if not is_installed(name)]


def is_installed(package: str) -> bool:
    """Whether sys.path has a distribution of this name, by the metadata that pip writes."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def unpacked(assets: Path | None, archive: str, folder: str) -> Path | None:
    """A folder of an archive among the assets, or None without the archive."""
    file = (assets or Path()) / archive
    if assets is None or not file.exists():
        return None
    target = UNPACKED / "data"
    mark = target / f".{folder}"
    if not mark.exists():
        with tarfile.open(file) as packed:
            packed.extractall(target, filter="data")
        mark.touch()
    return target / folder


def load_mdistiller_kd(folder: Path) -> Any:
    """mdistiller's class KD without the rest of its package; None without a checkout."""
    distillers = folder / "mdistiller" / "distillers"
    if not (distillers / "KD.py").exists():
        return None
    package = ModuleType("mdistiller_distillers")
    package.__path__ = [str(distillers)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.KD").KD
