"""`fastkd compress`."""

import argparse
import hashlib
import json
import re
from pathlib import Path

from fastkd.cli.running import session_of
from fastkd.compress.lessons import Lessons, original_of
from fastkd.compress.phases import Request, compress
from fastkd.compress.table import RuntimeMeter
from fastkd.compress.target import Target
from fastkd.deploy.latency.backends import BACKENDS
from fastkd.deploy.latency.measuring import check_names
from fastkd.errors import UserError

__all__ = ["compress_model"]


def compress_model(options: argparse.Namespace) -> int:
    """Run it, or go on; 1 if the student was measured above the target."""
    target = Target.parse(options.target)
    check_names([options.on])
    if reason := BACKENDS[options.on].missing():
        raise UserError(f"--on {options.on}: {reason}")
    request = Request(
        model=options.model,
        target=target,
        weights=options.weights,
        keys=_keys(options),
        short_epochs=options.short_epochs,
        keep=options.keep,
        draws=options.draws,
        stages=options.stages,
        seeds=options.seeds,
        dry_run=options.dry_run,
    )
    folder = Path(options.out) if options.out else _folder(options, request)
    # A mistake in a key is told before anything is measured.
    original, weights = original_of(request.model, request.weights, request.keys)
    recipe = Lessons(original, weights, request.keys, folder).recipe
    meter = RuntimeMeter(options.on, options.threads, options.batch)
    with session_of([recipe]) as session:
        session.console.note(f"folder {folder}")
        result = compress(request, folder, session, meter)
    return 0 if result is None or result["met"] else 1


def _keys(options: argparse.Namespace) -> tuple[str, ...]:
    for word in options.words:
        if "=" not in word:
            raise UserError(f"one network at a time, got {options.model} and {word}")
    names = [word for word in options.words if word.startswith(("data.root=", "data.name="))]
    if options.data is None and not names:
        raise UserError("which images? --data DIR, with folders of classes below train/ and val/")
    if options.data is None:
        return tuple(options.words)
    return (f"data.root={options.data}", *options.words)


def _folder(options: argparse.Namespace, request: Request) -> Path:
    """The same for the same words."""
    words = [options.on, options.threads, options.batch, options.target, request.model]
    words += [request.weights, *request.keys, request.short_epochs, request.keep, request.draws]
    text = json.dumps([*words, request.stages])
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", request.model).strip("-.") or "network"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path("runs") / "compress" / f"{name[-60:]}-{digest}"
