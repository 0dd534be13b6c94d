"""Whether a network that a weight file describes is in proportion to the file.

Metadata may come from strangers: `fastkd.models.registry` asks here before it builds anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch.overrides import TorchFunctionMode

from fastkd.config.mistakes import explain
from fastkd.config.values import is_list
from fastkd.errors import UserError
from fastkd.models.config import NETWORK_OPTIONS, StudentConfig
from fastkd.storage.weight_file import WeightFile

__all__ = ["check_proportion"]


class _Proportion(TorchFunctionMode):
    """Ends the building of a network that has many times the tensors of its file."""

    def __init__(self, file: WeightFile) -> None:
        super().__init__()
        sizes = [tensor.numel() for group in file.groups.values() for tensor in group.values()]
        self.tensors = 6 * len(sizes) + 500
        self.elements = 4 * sum(sizes) + 2**22

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full):
            size = (kwargs or {}).get("size", args[0] if args and is_list(args[0]) else args)
            self.tensors -= 1
            self.elements -= math.prod(side for side in size if isinstance(side, int))
            if min(self.tensors, self.elements) < 0:
                raise UserError("it is many times as large as the file")
        return func(*args, **(kwargs or {}))


def check_proportion(
    file: WeightFile, name: str, options: Mapping[str, Any], build: Callable[[], object]
) -> None:
    """UserError if a network that a file describes is not one of ours, or larger than the file.

    build: builds it, without memory where it can.
    """
    try:
        plain = {option: value for option, value in options.items() if option in NETWORK_OPTIONS}
        StudentConfig.model_validate({"name": name, **plain})
        with _Proportion(file):
            build()
    except Exception as error:  # whatever a constructor makes of absurd values
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, ValidationError):
            reason = "; ".join(explain(error, StudentConfig, options, ()))
        raise UserError(
            f"{file}: its metadata describe a network that cannot be built ({reason[:200]})"
        ) from error
