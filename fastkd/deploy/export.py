"""A trained network becomes a file: written under another name, proven, then renamed.

`fastkd export` (`fastkd.runs.export_saved`) and programs of users come in here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd.config.section import Normalization
from fastkd.deploy import hub, onnx_file, program
from fastkd.deploy.metadata import metadata_of
from fastkd.deploy.numerics import Comparison, on_noise
from fastkd.deploy.source import Choice, Source
from fastkd.deploy.target import check_target, proven
from fastkd.errors import RunFailed, UserError
from fastkd.models import use_kernels
from fastkd.models.intake import to_evaluation
from fastkd.models.rewrite.result import copied
from fastkd.models.taps import logits_of

__all__ = ["Exported", "Proof", "Prove", "export_network", "noise_proof"]

_NOISE = 16
"""Images of noise."""


@dataclass(frozen=True, slots=True)
class Proof:
    """How the file was compared with its source."""

    on: str
    """Which images."""
    compared: Comparison
    metrics: dict[str, Any] = field(default_factory=dict)
    """What both reach on them, for the screen."""


Prove = Callable[[nn.Module, nn.Module, Normalization | None], Proof]
"""(the source, the network read back from the file, the normalisation that the file does inside) ->
how far they are apart."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished file or folder."""

    path: Path
    proof: Proof
    lines: tuple[str, ...] = ()
    """How to load it, and where it was uploaded."""


def export_network(
    source: Source,
    target: str | Path,
    choice: Choice | None = None,
    *,
    prove: Prove | None = None,
    force: bool = False,
    push: str | None = None,
) -> Exported:
    """Write `source` to a file (hf: a folder) and compare it with what the file computes.

    prove: compares on real images; by default on noise. force: replace what is there. push: the
    repository on the Hugging Face Hub to which an hf folder is uploaded.

    Raises:
        UserError: the network cannot be exported so, or the name is taken.
        RunFailed: the file differs from its source. Nothing is left under its name.
    """
    choice, path = choice or Choice(), Path(target)
    _check(choice, path, source, push=push, force=force)
    prove = prove or noise_proof(source, choice)
    plain = copied(source.model)
    to_evaluation(plain)
    use_kernels(plain, "plain")
    with proven(path) as beside:
        network = _written(source, choice, beside, repo=push or f"USER/{path.name}")
        inside = source.normalization if choice.normalize else None
        proof = prove(plain, network, inside)
        if problem := proof.compared.problem(choice.bound):
            raise RunFailed(
                f"{path} was not written: compared on {proof.on}, {problem}{_advice(choice)}"
            )
        # Somebody may have taken the name meanwhile.
        check_target(path, force=force, files=choice.files)
    return Exported(path, proof, _lines(source, choice, path, push))


def _check(choice: Choice, path: Path, source: Source, *, push: str | None, force: bool) -> None:
    if push and choice.format != "hf":
        raise UserError(f"--push uploads the folder of --format hf, got --format {choice.format}")
    if choice.normalize and source.normalization is None:
        raise UserError(
            f"--normalize: how images are normalised for {source.title} is not known: set "
            f"data.mean and data.std"
        )
    if choice.format == "onnx":
        onnx_file.check_packages()
    if choice.format == "timm":
        hub.check_weights_name(path)
    check_target(path, force=force, files=choice.files)


def _advice(choice: Choice) -> str:
    if choice.half:
        return ": leave out --half"
    return ": set --no-fuse" if choice.fuse else ""


def _written(source: Source, choice: Choice, path: Path, *, repo: str) -> nn.Module:
    """Write it, and read it back as a network."""
    if choice.format == "timm":
        hub.write_timm_file(source, path, choice)
        return hub.read_timm_file(source, path)
    if choice.format == "hf":
        hub.write_folder(source, path, choice, repo)
        return hub.read_folder(source, path)
    captured, multiple = program.capture(source, choice)
    source = replace(source, multiple=max(multiple, source.multiple))
    metadata = metadata_of(source, choice)
    if choice.format == "torch-export":
        program.write_program(captured, path, metadata)
        read, _ = program.read_program(path)
        return program.ProgramNetwork(read, single=not choice.dynamic_batch)
    output = "embedding" if source.answers == "embedding" else "logits"
    onnx_file.write_onnx(captured, path, metadata, opset=choice.opset, output=output)
    return onnx_file.OnnxNetwork(onnx_file.OnnxFile.open(path))


def noise_proof(source: Source, choice: Choice) -> Prove:
    """Compares on noise, for want of images."""

    def prove(plain: nn.Module, network: nn.Module, inside: Normalization | None) -> Proof:
        def answers(images_NCHW: Tensor) -> Tensor:
            return logits_of(plain(images_NCHW))

        classes = source.answers != "embedding"
        shapes = _shapes(source, choice)
        compared = on_noise(answers, network, shapes, classes=classes, inside=inside)
        return Proof(f"{compared.images:,} images of noise", compared)

    return prove


def _shapes(source: Source, choice: Choice) -> list[tuple[int, int, int, int]]:
    """Several numbers of images if a file takes any, several sizes where pixels are labelled."""
    height, width = source.size
    batches = [8, _NOISE - 9, 1] if choice.dynamic_batch else [_NOISE]
    if source.answers != "pixels":
        return [(batch, 3, height, width) for batch in batches]
    step = max(32, source.multiple)
    return [
        (2, 3, height, width),
        (2, 3, height + step, width - step),
        (1, 3, 2 * step, 3 * step),
    ]


def _lines(source: Source, choice: Choice, path: Path, push: str | None) -> tuple[str, ...]:
    if choice.format == "timm":
        return (hub.file_line(source, path),)
    if choice.format != "hf":
        return ()
    lines = (hub.loader_line(source, str(path)),)
    if push is None:
        return lines
    repo = hub.push(path, push)
    return (*lines, f"uploaded to {repo}: {hub.loader_line(source, repo, hub=True)}")
