"""Named feature taps: one forward pass that returns the logits and chosen intermediate tensors.

Used by losses that read a network's inner tensors. Networks of the zoo walk through their taps
(`stem`, `stage1`.., `pooled`, `logits`, `stageN:preact`), so no hooks are needed, and any section
of them can be run alone. In any other module a tap is the path of a submodule, as in
`named_modules()`, and its output is caught by a forward hook that is idle outside the forward pass
of its own `Tapped`. Tap lists: RepDistiller's `is_feat` and `preact` lists.

`logits_of` alone decides what of a network's output counts as its logits.
"""

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.storage.foreign_checkpoints import KeyMap

__all__ = [
    "Tapped",
    "ZooNetwork",
    "available_taps",
    "check_network",
    "check_taps",
    "logits_of",
    "pooled_taps",
    "remove_taps",
]


class ZooNetwork(nn.Module):
    """A network that is written as a walk from tap to tap: images [N, 3, H, W] -> logits [N, C]."""

    tap_names: tuple[str, ...]
    """In the order of the walk; the last is `logits`."""
    head_path: ClassVar[str] = "fc"
    """Path of the classifier layer."""
    key_maps: ClassVar[Mapping[str, KeyMap]] = {}
    """Repository -> how its checkpoints name the parameters: a regular expression for the beginning
    of a name, up to a dot -> its replacement here, None if the tensor has no counterpart. The first
    match counts; names without a match are the same. Or a function from all names to the new ones.
    `fastkd.storage.fitting.load_into` finds out which repository it is."""

    def stage_paths(self) -> dict[str, tuple[str, ...]]:
        """Stage -> paths of its modules in order, such as {"stage1": ("layer1",)}."""
        return {}

    def walk(self, x: Tensor, after: str = "images") -> Iterator[tuple[str, Tensor]]:
        """Yield (tap, tensor) for every tap later than `after`, whose value is `x`."""
        raise TypeError(f"{type(self).__name__} must define walk(x, after), see ZooNetwork")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        return self.forward_taps(images_NCHW)["logits"]

    def forward_taps(self, images_NCHW: Tensor, wanted: Iterable[str] = ()) -> dict[str, Tensor]:
        """Return `logits` and every wanted tap, by name; anything else is freed on the way."""
        names, kept = {*wanted, "logits"}, {}
        for tap, tensor in self.walk(images_NCHW):
            if tap in names:
                kept[tap] = tensor
            del tensor  # or it would stay alive while the next stage is computed
        return kept

    def forward_between(self, features: Tensor, after: str, upto: str) -> Tensor:
        """Run only the layers after the tap `after`, on `features`, up to the tap `upto`."""
        return self.forward_from(features, after, (upto,))[upto]

    def forward_from(
        self, features: Tensor, after: str, wanted: Iterable[str]
    ) -> dict[str, Tensor]:
        """Run the layers after the tap `after`, on `features`, up to the last wanted tap.

        after: `images`, or any tap except `logits` and the `:preact` ones, which cannot be starting
        points.
        Raises UserError if a name is unknown or does not come after `after`.
        """
        starts = ("images", *(tap for tap in self.tap_names[:-1] if ":" not in tap))
        if after not in starts:
            raise UserError(f"cannot start after {after!r}; expected one of {', '.join(starts)}")
        missing = set(wanted)
        found: dict[str, Tensor] = {}
        for tap, tensor in self.walk(features, after):
            if tap in missing:
                found[tap] = tensor
                missing.remove(tap)
            if not missing:
                return found
        name, order = min(missing), ", ".join(self.tap_names)
        raise UserError(f"no tap {name!r} after {after!r}; the order is {order}")


def check_network(owner: str, model: object) -> None:
    """UserError for anything but a network, above all for the name of one."""
    if not isinstance(model, nn.Module):
        made = "build it first" if isinstance(model, str) else "such as one"
        raise UserError(
            f"{owner}: got {model!r}; expected a network (nn.Module), {made} by "
            f"fastkd.create_model(NAME, num_classes=..)"
        )


def available_taps(model: nn.Module) -> tuple[str, ...]:
    """Names that `Tapped(model, ...)` accepts; for the zoo in the order of the forward pass."""
    if isinstance(model, ZooNetwork):
        return model.tap_names
    return (*(path for path, _ in model.named_modules() if path), "logits")


def pooled_taps(model: nn.Module, classifier: nn.Module, images_NCHW: Tensor) -> tuple[str, ...]:
    """Taps whose mean over the pixels is the only input of `classifier`.

    Found by one forward pass of a network in evaluation mode, the largest maps first. A `:preact`
    tap is rectified before the mean.
    """
    found: dict[str, tuple[int, Tensor]] = {}
    got: list[Any] = []

    def note(tap: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(value, Tensor) and value.dim() == 4:
            map_NCHW = value.relu() if tap.endswith(":preact") else value
            # Immediately: a later layer may overwrite it.
            found[tap] = (-map_NCHW[0, 0].numel(), map_NCHW.float().mean((2, 3)))

    zoo = isinstance(model, ZooNetwork)
    handles = [classifier.register_forward_hook(lambda _, args, out: got.extend((args[0], out)))]
    for path, module in () if zoo else model.named_modules():
        hook = functools.partial(lambda tap, _, __, output: note(tap, output), path)
        handles += [module.register_forward_hook(hook)] if path else []
    try:
        with torch.no_grad():
            if isinstance(model, ZooNetwork):
                features = model.forward_taps(images_NCHW, model.tap_names)
                logits = features["logits"]
                for tap, value in features.items():
                    note(tap, value)
            else:
                logits = logits_of(model(images_NCHW))
    finally:
        for handle in handles:
            handle.remove()
    if len(got) != 2 or not _near(got[1], logits):
        return ()
    taps = [tap for tap, (_, mean_ND) in found.items() if _near(mean_ND, got[0])]
    return tuple(sorted(taps, key=lambda tap: (found[tap][0], tap.count("."))))


def _near(one: Tensor, other: Tensor) -> bool:
    """Same shape and equal within a hundredth, which tolerates rounding to bf16."""
    if one.shape != other.shape:
        return False
    return bool((one - other).float().norm() <= 1e-2 * other.float().norm())


class Tapped(nn.Module):
    """`Tapped(model, taps)(images)` -> dict with `logits` and each tap, on the weights of `model`.

    The model stays usable on its own and its `state_dict` is unchanged. For modules outside the zoo
    forward hooks are installed; `remove()` removes them. A submodule that runs several
    times in one pass reports its last output; of a tuple or list the first tensor counts. A map
    [N, H, W, C], as the blocks of Swin give it, comes as [N, C, H, W]: it is recognised by the
    proportions of the images.

    The result lacks `logits` where the taps do not name them and the output has none that
    `logits_of` knows: an encoder has none. may_skip: in training mode it lacks a tap whose module
    did not run in this pass (LayerDrop, stochastic depth); otherwise that is an error.

    Raises UserError for an unknown tap (with the nearest name), for a tapped module that did not
    run, and for a tapped output that a later layer overwrote in place (seen in eager mode only).
    """

    def __init__(
        self, model: nn.Module, taps: Sequence[str] = (), *, may_skip: bool = False
    ) -> None:
        super().__init__()
        if isinstance(taps, str):
            raise TypeError(f"taps must be a list of names, got {taps!r}; write [{taps!r}]")
        self.model = model
        self.taps = tuple(dict.fromkeys(taps))
        self.may_skip = may_skip
        check_taps(self.taps, model)
        self._catch = None if isinstance(model, ZooNetwork) else _Catch()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        if self._catch is not None:
            for tap in self.taps:
                if tap != "logits":
                    hook = _Hook(tap, self._catch)
                    self._handles.append(model.get_submodule(tap).register_forward_hook(hook))

    def forward(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """Run the model once; the keys of the result are `logits` and the taps."""
        if self._catch is None:
            return cast(ZooNetwork, self.model).forward_taps(images_NCHW, self.taps)
        catch = self._catch
        catch.active = True
        try:
            output = self.model(images_NCHW)
            caught = dict(catch.tensors)
        finally:
            catch.active = False
            catch.tensors.clear()
        result: dict[str, Tensor] = {}
        logits = _tensor_in(output, _LOGITS)
        if logits is not None:
            result["logits"] = logits
        elif not self.taps or "logits" in self.taps:
            logits_of(output)  # which raises
        for tap in self.taps:
            if tap == "logits":
                continue
            if tap not in caught:
                if self.may_skip and self._handles and self.model.training:
                    continue
                raise UserError(_did_not_run(tap, removed=not self._handles))
            tensor, version = caught[tap]
            result[tap] = _channels_first(tensor, images_NCHW)
            if _version(tensor) != version:
                raise UserError(
                    f"tap {tap!r}: a later layer overwrites this output in place, so a loss would "
                    "see changed values; tap that layer, or build the network with inplace=False"
                )
        return result

    def remove(self) -> None:
        """Remove the hooks from the model, which stays usable; `Tapped` cannot be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def remove_taps(*models: nn.Module | None) -> None:
    """Remove the hooks of every `Tapped` from these models."""
    for model in models:
        for module in model.modules() if model is not None else ():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, _Hook):
                    del module._forward_hooks[key]


class _Catch:
    """Stores the outputs that the hooks of one `Tapped` see; filled only while `active`."""

    def __init__(self) -> None:
        self.active = False
        self.tensors: dict[str, tuple[Tensor, int]] = {}


class _Hook:
    """Forward hook of one tap; an object, not a closure, so that a deep copy gets its own."""

    def __init__(self, tap: str, catch: _Catch) -> None:
        self.tap = tap
        self.catch = catch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.catch.active:
            tensor = _tensor_in(output, _FEATURES)
            if tensor is None:
                raise UserError(_no_tensor(f"tap {self.tap!r}", output, _FEATURES))
            self.catch.tensors[self.tap] = (tensor, _version(tensor))


def _version(tensor: Tensor) -> int:
    """In-place modification counter; 0 if there is none (inference mode) or while compiling."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


_LOGITS = ("logits", "out")
"""Under these names a mapping, or another object, holds the logits: the first that it has."""
_FEATURES = (*_LOGITS, "last_hidden_state")


def logits_of(output: Any) -> Tensor:
    """What counts as the logits in what a network returns; the one rule of fastkd.

    A tensor is the logits itself. A mapping or another object with fields, such as a ModelOutput of
    Hugging Face or the dict of torchvision's segmentation networks, has them as `logits`, else as
    `out`. Of a tuple or list the first entry counts, by the same rule: the heads that Inception and
    GoogLeNet add in training, and a list of features, come after it.

    Raises:
        UserError: the output is none of these.
    """
    found = _tensor_in(output, _LOGITS)
    if found is None:
        raise UserError(_no_tensor("the model", output, _LOGITS))
    return found


def _tensor_in(output: Any, names: Sequence[str]) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        held = [output[name] for name in names if name in output]
    else:
        held = [getattr(output, name) for name in names if hasattr(output, name)]
    if held:
        return held[0] if isinstance(held[0], Tensor) else None
    if isinstance(output, tuple | list) and output:
        first = output[0]
        # A list inside a list holds features, not logits.
        return None if isinstance(first, tuple | list) else _tensor_in(first, names)
    return None


def _no_tensor(owner: str, output: Any, names: Sequence[str]) -> str:
    got = type(output).__name__
    if isinstance(output, Mapping):
        got += f" with {', '.join(map(str, output)) or 'no keys'}"
    keys = " or ".join(map(repr, names))
    return (
        f"{owner} returned {got}; expected a tensor, a tuple that starts with one, or a mapping "
        f"with the key {keys}: wrap it in a module whose forward returns that"
    )


def _channels_first(value: Tensor, images_NCHW: Tensor) -> Tensor:
    """A map [N, H, W, C] as [N, C, H, W]; anything else as it is."""
    if value.dim() != 4 or images_NCHW.dim() != 4:
        return value
    _, one, two, three = value.shape
    height, width = images_NCHW.shape[2:]

    def proportioned(h: int, w: int) -> bool:
        return abs(h * width - w * height) < max(height, width)

    if proportioned(one, two) and not proportioned(two, three):
        return value.permute(0, 3, 1, 2)
    return value


def check_taps(taps: Sequence[str], model: nn.Module) -> None:
    """UserError for a name that `Tapped(model, ..)` does not accept, with the nearest ones."""
    names = available_taps(model)
    for tap in taps:
        if tap not in names:
            near = difflib.get_close_matches(tap, names, n=3, cutoff=0.4)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            shown = ", ".join(names[:20]) + (
                f", .. ({len(names)} in all)" if len(names) > 20 else ""
            )
            raise UserError(f"unknown tap {tap!r}{hint}. Taps of {type(model).__name__}: {shown}")


def _did_not_run(tap: str, *, removed: bool) -> str:
    if removed:
        return f"tap {tap!r}: the hooks were removed; build a new Tapped"
    return f"tap {tap!r}: this module did not run in the forward pass; tap one that does"
