"""fastkd: fast knowledge distillation for vision networks.

The public names are loaded on first use, so that `import fastkd` costs next to nothing and pulls in
neither Triton, DALI, timm, matplotlib nor scikit-learn.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if importlib.util.find_spec("fastkd.kernels") is None:
    raise ImportError(
        "fastkd was imported from its source folder, where `kernels/` is not yet mapped to "
        "`fastkd.kernels`. Install the checkout once: pip install -e ."
    )

if TYPE_CHECKING:
    from fastkd.api import distill as distill
    from fastkd.models import cheapen as cheapen
    from fastkd.models import count as count
    from fastkd.models import create_model as create_model
    from fastkd.models import fuse as fuse
    from fastkd.models import remove_shortcuts as remove_shortcuts
    from fastkd.models import use_kernels as use_kernels

_HOME = {
    "cheapen": "fastkd.models",
    "count": "fastkd.models",
    "create_model": "fastkd.models",
    "distill": "fastkd.api",
    "fuse": "fastkd.models",
    "remove_shortcuts": "fastkd.models",
    "use_kernels": "fastkd.models",
}

__all__ = [
    "__version__",
    "cheapen",
    "count",
    "create_model",
    "distill",
    "fuse",
    "remove_shortcuts",
    "use_kernels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}; it has {sorted(_HOME)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
