"""`fastkd export`."""

import argparse
import shlex

from fastkd.deploy.source import Choice
from fastkd.errors import UserError
from fastkd.output.console import Console
from fastkd.runs.export_saved import Request, export

__all__ = ["export_saved"]


def export_saved(options: argparse.Namespace) -> None:
    """Write the file or folder, and say how near it is to the network."""
    choice = Choice(
        format=options.format,
        fuse=options.fuse,
        opset=options.opset,
        dynamic_batch=options.dynamic_batch,
        half=options.half,
        normalize=options.normalize,
    )
    request = Request(
        what=options.what,
        weights=options.weights,
        keys=tuple(options.words),
        check=_images(options.check),
        command=_command(options),
    )
    console = Console(enabled=True)
    done = export(
        request, options.out, choice, force=options.force, push=options.push, say=console.note
    )
    compared = done.proof.compared
    facts = {
        "compared on": done.proof.on,
        "max difference": f"{compared.max_difference:.1e} of the largest |logit|",
        "mean difference": f"{compared.mean_difference:.1e}",
    }
    if compared.agreement is not None:
        ties = f" ({compared.unequal} ties)" if compared.unequal else ""
        facts["same top-1"] = f"{compared.agreement:.2%}{ties}"
    console.facts(f"wrote {done.path}", facts | done.proof.metrics)
    for line in done.lines:
        console.note(line)


def _images(text: str) -> int | None:
    """Number of images; None: all."""
    if text == "all":
        return None
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise UserError(f"--check {text}: expected a number of images, or all")
    return int(text)


def _command(options: argparse.Namespace) -> str:
    """The command as the model card shows it, without what only concerns this machine."""
    words = ["fastkd", "export", options.what, "--format", options.format, "--out", options.out]
    if options.weights:
        words += ["--weights", options.weights]
    words += [flag for flag in ("--half",) if options.half]
    keys = [key for key in options.words if not key.startswith("data.root=")]
    return shlex.join([*words, *keys])
