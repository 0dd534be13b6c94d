"""Maps `kernels/` to `fastkd.kernels` and builds the C++ core; all metadata is in pyproject.toml.

An editable install is a plain path in site-packages: `.editable/`, which holds nothing but a link
to `fastkd/`, in which a link leads to `kernels/`. With setuptools' import hook in its place, the
folder above a clone named fastkd would hide the package: there the clone looks like a package
without `__init__.py`, and Python asks hooks last.

The core (`libfastkd_cpu.so`) needs neither torch nor Python to build: it is a plain C library that
`kernels/_library.py` opens with ctypes. Without a C++ compiler, or with FASTKD_NO_CPP=1 in the
environment, fastkd installs without it and `fastkd doctor` says so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CORE = "fastkd.kernels.libfastkd_cpu"


def core_is_wanted() -> bool:
    """Build the core when it is not switched off and there is something to compile it with."""
    if os.environ.get("FASTKD_NO_CPP", "0") not in ("", "0"):
        return False
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return any(shutil.which(name.split()[0]) for name in compilers if name and name.split())


class BuildCore(build_ext):
    """Runs CMake in a fresh folder; a failure is reported and installs without the core."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python ABI in the name: the library has no Python symbol."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and copy the one library; never raises for a failed compilation."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # A build folder that outlives the build remembers compilers and paths that are gone.
        with tempfile.TemporaryDirectory(prefix="fastkd-core-") as folder:
            try:
                configure = ["cmake", "-S", str(ROOT), "-B", folder, *generator]
                subprocess.run([*configure, f"-DFASTKD_OUTPUT_DIR={folder}"], check=True)
                subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)
                built = Path(folder) / target.name
                target.parent.mkdir(parents=True, exist_ok=True)
                # Replace, never overwrite: a process may have the old file mapped.
                staged = target.with_name(target.name + ".new")
                shutil.copyfile(built, staged)
                os.replace(staged, target)
            except (OSError, subprocess.CalledProcessError) as error:
                target.unlink(missing_ok=True)
                print(
                    f"fastkd: the C++ core was not built ({error}); the eager reference will run",
                    file=sys.stderr,
                )


def linked() -> dict[str, str]:
    """Make the links of an editable install; where its packages are."""
    links = {ROOT / ".editable" / "fastkd": "../fastkd", ROOT / "fastkd" / "kernels": "../kernels"}
    for link, target in links.items():
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)
    return {"": ".editable"}


KERNELS = ["fastkd.kernels"] + [f"fastkd.kernels.{p}" for p in find_packages("kernels")]
# The word with which pip asks for an editable install (PEP 660).
EDITABLE = linked() if "editable_wheel" in sys.argv else None

setup(
    packages=find_packages(include=["fastkd", "fastkd.*"], exclude=["fastkd.kernels*"]) + KERNELS,
    package_dir=EDITABLE or {"fastkd": "fastkd", "fastkd.kernels": "kernels"},
    package_data={
        "fastkd": [
            "py.typed",
            "losses/__init__.pyi",
            "models/planner/costs.json",
            "recipes/published.json",
        ]
    },
    # Only where a compiler exists but CMake does not is CMake asked of the package index.
    setup_requires=["cmake>=3.18"] if core_is_wanted() and not shutil.which("cmake") else [],
    ext_modules=[Extension(CORE, sources=[], optional=True)] if core_is_wanted() else [],
    cmdclass={"build_ext": BuildCore},
)
