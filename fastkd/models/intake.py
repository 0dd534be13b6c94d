"""What a network takes: type and size of its images; if it refuses them, one sentence says why.

Used where networks meet images: `training.step` and `teachers.teacher` for the type,
`training.matching`, `training.trial` and `runs.evaluate_saved` for the sentence.
"""

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.compute.precision import Precision
from fastkd.errors import UserError
from fastkd.models.taps import ZooNetwork
from fastkd.printable import first_line

__all__ = [
    "Remedy",
    "fails_under_autocast",
    "image_dtype",
    "is_compiled_ahead",
    "is_quantised",
    "noting_wrong_gradients",
    "own_dtype",
    "refusal",
    "restored_after",
    "to_evaluation",
    "wrong_in_bf16",
]

SIDES = (32, 64, 75, 96, 128, 160, 192, 224, 256, 299, 384, 448, 512)
"""Tried in this order where a network has no size of its own and refuses that of the images."""


@dataclass(frozen=True)
class Remedy:
    """How the user gives a network other images: ends of sentences."""

    size: str = "give it images of {0}x{0} pixels"
    """With the side that works for {0}."""
    precision: str = "compute it in fp32"


def image_dtype(model: object, precision: Precision) -> torch.dtype:
    """The type in which a network is shown its images under `precision.autocast()`.

    fp32, as in any training loop: autocast rounds where a layer wants it, and the network may do
    with the image what only fp32 can (resize it, look at it with numpy). Networks of the zoo begin
    with a convolution, so their images are rounded beforehand: the same numbers, half the bytes.
    """
    return precision.dtype if isinstance(model, ZooNetwork) else torch.float32


def own_dtype(model: nn.Module) -> torch.dtype | None:
    """The one floating type of all weights; None for several, or no weights."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def is_quantised(model: nn.Module) -> bool:
    """Whether torch quantised some of its layers: they take fp32 and know no autocast."""
    places = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
    return any(type(module).__module__.startswith(places) for module in model.modules())


def is_compiled_ahead(model: nn.Module) -> bool:
    """Whether a forward pass in it was written down before: TorchScript, or `torch.export`."""
    return any(isinstance(m, torch.jit.ScriptModule) or _is_exported(m) for m in model.modules())


def _is_exported(module: nn.Module) -> bool:
    # What torch.export returns has a `train` of its own, which refuses.
    return isinstance(module, torch.fx.GraphModule) and "train" in vars(module)


def to_evaluation(model: nn.Module) -> None:
    """Evaluation mode; an exported program, whose mode is fixed, keeps its own."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False


@contextmanager
def restored_after(model: nn.Module, *, but: Collection[str] = ()) -> Iterator[None]:
    """The network may run in any mode within the block; afterwards all is as before.

    Modes, buffers (such as running statistics), torch's and Python's random state are restored.
    but: names of buffers that a forward pass does not change.
    """
    # A frozen program of TorchScript has no mode.
    modes = [(one, one.training) for one in model.modules() if hasattr(one, "training")]
    buffers: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (owner._buffers, name, buffer, buffer.clone())
        for path, owner in model.named_modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if f"{path}.{name}".lstrip(".") not in but
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    state = random.getstate()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(state)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for owned, name, buffer, before in buffers:
                # It may have been replaced, resized in place, or made in inference mode, whose
                # tensors cannot be written.
                kept = buffer.shape == before.shape and not buffer.is_inference()
                owned[name] = buffer if kept else before
                owned[name].copy_(before)


def fails_under_autocast(model: nn.Module, images_NCHW: Tensor, precision: Precision) -> str | None:
    """Why a network that runs in fp32 fails under autocast; None if it does not fail, or in both.

    It happens where a layer's answer goes through numpy, or into an operator without bf16.
    """
    if precision.name == "fp32" or isinstance(model, ZooNetwork) or is_quantised(model):
        return None
    plain = Precision("fp32", precision.device_type)
    images_NCHW = images_NCHW.float()
    with restored_after(model):
        to_evaluation(model)
        error = _error(model, images_NCHW, precision)
        if error is None or _error(model, images_NCHW, plain) is not None:
            return None
    return first_line(error)


def _computes_in_bf16(model: nn.Module, precision: Precision) -> bool:
    """Whether its gradients may be oneDNN's in bf16."""
    on_cpu = precision.name == "bf16" and precision.device_type == "cpu"
    return on_cpu and not is_compiled_ahead(model)


@contextmanager
def noting_wrong_gradients(model: nn.Module, precision: Precision) -> Iterator[list[str]]:
    """The layers whose gradient torch gets wrong in bf16 on a CPU, filled by passes in the block.

    A convolution of a 1x1 map with a stride above 1, or a kernel above 3, leaves the gradient of
    the taps that saw only padding uninitialised (oneDNN; torch 2.11 to 2.15): NaN, or a number of
    any size that no check of finite values notices. fp32, larger maps and 3x3 kernels of stride 1
    are sound.
    """
    found: list[str] = []
    if not _computes_in_bf16(model, precision):
        yield found
        return

    def look(name: str, module: nn.Conv2d, inputs: tuple[Any, ...]) -> None:
        kernel, stride = max(module.kernel_size), max(module.stride)
        exposed = kernel > 1 and (stride > 1 or kernel > 3)
        if exposed and inputs and tuple(inputs[0].shape[2:]) == (1, 1):
            found.append(name)

    hooks = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def wrong_in_bf16(model: nn.Module, images_NCHW: Tensor, precision: Precision) -> str | None:
    """The first of `noting_wrong_gradients`, by a pass of its own; None if there is none."""
    if not _computes_in_bf16(model, precision):
        return None
    with (
        noting_wrong_gradients(model, precision) as wrong,
        restored_after(model),
        torch.no_grad(),
        precision.autocast(),
    ):
        to_evaluation(model)
        model(images_NCHW.to(image_dtype(model, precision)))
    return wrong[0] if wrong else None


def _error(
    run: Callable[[Tensor], Any], images_NCHW: Tensor, precision: Precision
) -> Exception | None:
    try:
        with torch.no_grad(), precision.autocast():
            run(images_NCHW)
    except Exception as error:
        # Foreign code can fail in any way.
        return error
    return None


def _takes(
    model: nn.Module,
    run: Callable[[Tensor], Any],
    images_NCHW: Tensor,
    precision: Precision,
    *,
    trained: bool,
) -> bool:
    """Whether it runs as it is; if `trained`, in training mode and in evaluation mode.

    Heads that only training has may want larger images.
    """
    if not trained:
        return _error(run, images_NCHW, precision) is None
    with restored_after(model):
        for training in (False, True):
            model.train(training)
            if _error(run, images_NCHW, precision) is not None:
                return False
    return True


def refusal(
    error: Exception,
    *,
    title: str,
    model: nn.Module,
    run: Callable[[Tensor], Any],
    images_NCHW: Tensor,
    precision: Precision,
    remedy: Remedy,
    trained: bool = False,
) -> UserError:
    """What to tell the user about a network that failed on images; remedies are tried first.

    model: for the size that it names itself.
    run: shows it images, as the run will, but without autocast.
    trained: whether it must take them in training, too.
    """
    height, width = images_NCHW.shape[2:]
    why = first_line(error)

    for side in (_own_side(model), *SIDES):
        if side is None or height == width == side:
            continue
        # Two, as one is not a batch to a batch norm in training.
        rows = max(2, len(images_NCHW)) if trained else len(images_NCHW)
        other_NCHW = images_NCHW.new_zeros(rows, images_NCHW.shape[1], side, side)
        if _takes(model, run, other_NCHW, precision, trained=trained):
            return UserError(
                f"{title} does not take images of {height}x{width} pixels ({why}), but those of "
                f"{side}x{side}: {remedy.size.format(side)}"
            )
    plain = Precision("fp32", precision.device_type)
    if precision.name != "fp32" and _error(run, images_NCHW.float(), plain) is None:
        return UserError(
            f"{title} fails under autocast to {precision.name} ({why}): {remedy.precision}"
        )
    if any(map(_is_exported, model.modules())):
        return UserError(
            f"{title} fails on {len(images_NCHW)} images ({why}). If it was exported for one "
            f"number of images: fastkd also shows it other numbers (a few to try it, a smaller "
            f"last batch), so export it with dynamic_shapes=({{0: torch.export.Dim.DYNAMIC}},)"
        )
    shape = ", ".join(map(str, images_NCHW.shape[1:]))
    return UserError(f"{title} fails on images of [{shape}]: {why}")


def _own_side(model: nn.Module) -> int | None:
    """The side that timm, torchvision and transformers note in a network."""
    details: Any = model
    config = getattr(details, "pretrained_cfg", None)
    side = config["input_size"][-1] if isinstance(config, dict) and "input_size" in config else None
    if side is None:
        side = getattr(details, "image_size", None)
    if side is None:
        side = getattr(getattr(details, "config", None), "image_size", None)
    side = side[-1] if isinstance(side, tuple | list) else side
    return side if isinstance(side, int) else None
