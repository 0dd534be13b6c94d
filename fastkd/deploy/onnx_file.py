"""ONNX files: written by torch's exporter, read back and run by onnxruntime.

The extra `export` brings what is needed: onnx, onnxscript, onnxruntime.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import __version__
from fastkd.deploy.metadata import facts_in
from fastkd.deploy.program import in_pieces, quietly
from fastkd.errors import UserError
from fastkd.models.card import Card, sign
from fastkd.printable import first_line
from fastkd.storage.description import NetworkFacts

__all__ = [
    "OnnxFile",
    "OnnxNetwork",
    "check_packages",
    "converted",
    "packages_missing",
    "write_onnx",
]

INSTALL = "install them by `pip install 'fastkd[export]'`"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Two that write ONNX files, and one that runs them."""
LARGEST = 2_000_000_000
"""Bytes of a file in protobuf's format."""


def packages_missing(names: Sequence[str] = PACKAGES) -> str | None:
    """What is missing of the packages that write and run ONNX files, and how to get it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"ONNX files need {' and '.join(missing)}: {INSTALL}" if missing else None


def check_packages(names: Sequence[str] = PACKAGES) -> None:
    """UserError if one is missing."""
    if reason := packages_missing(names):
        raise UserError(reason)


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: Mapping[str, str],
    *,
    opset: int | None,
    output: str,
) -> None:
    """Convert a captured network and say in the file what it is. Raises what `converted` raises."""
    import onnx

    model: Any = converted(program, opset=opset, output=output).model_proto
    _name_axes(model)
    model.producer_name, model.producer_version = "fastkd", __version__
    onnx.helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString())


def converted(
    program: torch.export.ExportedProgram, *, opset: int | None = None, output: str = "logits"
) -> torch.onnx.ONNXProgram:
    """A captured network in ONNX; its input is called `images`.

    Raises UserError if it uses an operator that the exporter does not know, cannot be brought to
    this opset, or is too large for one file.
    """
    weights = sum(one.numel() * one.element_size() for one in program.state_dict.values())
    if weights > LARGEST:
        raise UserError(
            f"the network has {weights / 1e9:.1f} GB of weights, and an ONNX file holds 2 GB: use "
            f"--half, or --format torch-export"
        )
    try:
        with quietly():
            made: Any = torch.onnx.export(
                program,
                (),
                input_names=["images"],
                output_names=[output],
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        # The exporter passes on errors of three packages.
        raise UserError(_sentence(error)) from error
    _check_opset(made.model.opset_imports, opset)
    return made


def _sentence(error: BaseException) -> str:
    """What the exporter means: its innermost message."""
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    for one in (str(innermost), str(error)):
        found = re.search(r"No ONNX function found for <?OpOverload\(op='([\w.:]+)'", one)
        if found:
            return (
                f"torch's ONNX exporter does not know the operator {found[1]}, which the network "
                f"uses: use --format torch-export"
            )
    return f"torch's ONNX exporter failed: {first_line(innermost)}"


def _check_opset(versions: Mapping[str, int], wanted: int | None) -> None:
    """versions: of opsets by domain."""
    own = versions.get("", versions.get("ai.onnx"))
    if wanted not in (None, own):
        raise UserError(
            f"torch's ONNX exporter cannot write the network in opset {wanted}, it stays at {own}: "
            f"leave out --opset"
        )


def _name_axes(model: Any) -> None:
    """`batch`, `height`, `width` instead of numbered symbols, also within expressions."""
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    named = {
        size.dim_param: name
        for size, name in zip(sizes, ("batch", "channels", "height", "width"), strict=True)
        if size.dim_param
    }
    symbols = {old: new for old, new in named.items() if old.isidentifier()}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            text = str(named.get(size.dim_param) or size.dim_param)
            for old, new in symbols.items():
                text = re.sub(rf"\b{old}\b", new, text)
            if text:
                size.dim_param = text


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """An opened file of any origin that takes images [N, 3, H, W] in fp32."""

    path: Path
    session: Any
    """onnxruntime's."""
    metadata: dict[str, str]
    input: str
    shape: tuple[int | None, ...]
    """Of the images; None: any size."""

    @classmethod
    def open(cls, path: str | Path) -> "OnnxFile":
        """Read and check a file. UserError if it is missing, damaged, or no network for images."""
        path = Path(path)
        check_packages(["onnxruntime"])
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            metadata = dict(session.get_modelmeta().custom_metadata_map)
        except Exception as error:
            # onnxruntime has a class of its own for each way in which a file is damaged.
            said = first_line(error).rpartition(" : ")[2]
            raise UserError(f"{path}: damaged, or not an ONNX file ({said})") from error
        inputs = session.get_inputs()
        if not _takes_images(inputs):
            raise UserError(
                f"{path}: expected one input [N, 3, H, W] in fp32, it takes "
                f"{', '.join(f'{one.name} {one.type} {one.shape}' for one in inputs) or 'nothing'}"
            )
        shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
        return cls(path, session, metadata, inputs[0].name, shape)

    @property
    def facts(self) -> NetworkFacts:
        """What `fastkd export` wrote about the network. UserError for other files."""
        return facts_in(self.metadata, self.path)

    def run(self, images_NCHW: Tensor) -> Tensor:
        """The first output, for as many images as the file takes in a call."""
        try:
            (answers, *_) = self.session.run(None, {self.input: images_NCHW.numpy()})
        except Exception as error:
            raise UserError(self._refusal(images_NCHW, error)) from error
        return torch.from_numpy(answers)

    def _refusal(self, images_NCHW: Tensor, error: Exception) -> str:
        given = tuple(images_NCHW.shape[2:])
        wanted = self.shape[2:]
        if any(size not in (None, own) for size, own in zip(wanted, given, strict=True)):
            height, width = (size or "any" for size in wanted)
            return (
                f"{self.path} takes images of {height}x{width} pixels, these have "
                f"{given[0]}x{given[1]}: export it for that size, by data.image_size"
            )
        return f"{self.path}: onnxruntime cannot run it ({first_line(error)})"


def _takes_images(inputs: Sequence[Any]) -> bool:
    """Whether a session's inputs are one of fp32 colour images."""
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        return False
    channels = inputs[0].shape[1]
    return channels == 3 or not isinstance(channels, int)


class OnnxNetwork(nn.Module):
    """images [N, 3, H, W] -> answers of an ONNX file, on the CPU.

    Of a file of `fastkd export` it has a card: classes, framing, and the normalisation that
    remains to be done outside.
    """

    def __init__(self, file: OnnxFile) -> None:
        super().__init__()
        self.file = file
        if "fastkd" not in file.metadata:
            return
        facts = file.facts
        sign(
            self,
            Card(
                name=facts.architecture,
                num_classes=facts.num_classes,
                normalization=facts.normalization,
                data=facts.data,
            ),
        )

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """The answers."""
        return in_pieces(self.file.run, images_NCHW, single=self.file.shape[0] == 1)
