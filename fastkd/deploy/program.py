"""A network captured by `torch.export`: what ONNX files are made of, and a format of its own."""

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.deploy.source import Choice, Deployed, Source
from fastkd.errors import UserError
from fastkd.printable import first_line

__all__ = [
    "ProgramNetwork",
    "capture",
    "captured",
    "in_pieces",
    "quietly",
    "read_program",
    "write_program",
]

ENTRY = "fastkd.json"
"""The metadata, among the extra files of an exported program."""

MULTIPLES = (1, 8, 16, 32)
"""Tried in this order: of what a network for label maps needs height and width to be multiples."""


def capture(source: Source, choice: Choice) -> tuple[torch.export.ExportedProgram, int]:
    """The computation, and of what free heights and widths must be multiples.

    Raises UserError if torch cannot capture it.
    """
    network = Deployed(source, choice).eval()
    # One image would be taken for the only possible number.
    images_NCHW = torch.zeros(2 if choice.dynamic_batch else 1, 3, *source.size)
    if source.answers != "pixels":
        return captured(network, images_NCHW, _axes(choice, None), source.title), 1
    failed: UserError | None = None
    for multiple in MULTIPLES:
        if multiple < source.multiple:
            continue
        try:
            axes = _axes(choice, multiple)
            return captured(network, images_NCHW, axes, source.title), multiple
        except UserError as error:
            failed = failed or error
    assert failed is not None
    raise failed


def _axes(choice: Choice, multiple: int | None) -> dict[int, Any]:
    """The axes of the images that may have any size."""
    dim = torch.export.Dim
    axes: dict[int, Any] = {0: dim.DYNAMIC} if choice.dynamic_batch else {}
    if multiple == 1:
        axes |= {2: dim.DYNAMIC, 3: dim.DYNAMIC}
    elif multiple is not None:
        axes |= {2: multiple * dim("height", min=2), 3: multiple * dim("width", min=2)}
    return axes


def captured(
    network: nn.Module, images_NCHW: Tensor, axes: dict[int, Any], title: str
) -> torch.export.ExportedProgram:
    """One network as torch sees it. axes: of the images, that may have any size.

    Raises UserError if torch cannot capture it.
    """
    shapes = (axes,) if axes else None
    try:
        with quietly(), torch.no_grad():
            return torch.export.export(network, (images_NCHW,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        # Foreign code can fail in any way.
        free = " for any number of images" if axes.keys() == {0} else ""
        raise UserError(
            f"torch.export cannot capture {title}{free}: {first_line(error)}"
        ) from error


def write_program(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]
) -> None:
    """Save it with the metadata inside."""
    # Of a path torch wants a certain suffix.
    buffer = io.BytesIO()
    with quietly():
        torch.export.save(program, buffer, extra_files={ENTRY: json.dumps(dict(metadata))})
    path.write_bytes(buffer.getvalue())


def read_program(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """What `write_program` wrote. UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    extra: dict[str, Any] = {ENTRY: ""}
    try:
        with quietly():
            program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
        text = extra[ENTRY]
        return program, json.loads(text) if text else {}
    except Exception as error:
        # A damaged archive fails in many ways.
        raise UserError(
            f"{path}: damaged, or not a file of torch.export ({first_line(error)})"
        ) from error


class ProgramNetwork(nn.Module):
    """images [N, 3, H, W] -> answers of an exported program, one by one if it takes one image."""

    def __init__(self, program: torch.export.ExportedProgram, *, single: bool) -> None:
        super().__init__()
        # Hidden: it stays on the CPU, and refuses to be put into a mode.
        self._run = (program.module(),)
        self.single = single

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """The answers."""
        return in_pieces(self._run[0], images_NCHW, single=self.single)


def in_pieces(run: Any, images_NCHW: Tensor, *, single: bool) -> Tensor:
    """`run` of all images at once, or one by one."""
    images_NCHW = images_NCHW.contiguous().float()
    if not single or len(images_NCHW) == 1:
        return run(images_NCHW)
    return torch.cat([run(image_1CHW) for image_1CHW in images_NCHW.split(1)])


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings and log lines by which torch's exporters explain themselves."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
