"""Decides, on the device and equally on all ranks, whether a step counts, and undoes it if not.

Flow: `update.Update`, per optimizer step

    guard.before_step()                     # copy the buffers (batch norm statistics)
    ... forward and backward of all micro-batches ...
    ok = guard.judge(losses, gradients, clip_norm)
    guard.apply(ok)                         # optimizer step, or nothing changes
    ema.update(ok)
    ... where metrics are fetched anyway: guard.check()

A step is good when the loss is finite on every rank and so is the norm of the gradients, which DDP
has already summed. A bad step leaves parameters, buffers and optimizer state bitwise unchanged.
With a skip-aware optimizer on a GPU nothing here waits for the device, except `counts`, `check`
and `state_dict`. With fp16 call `scaler.unscale_(optimizer)` before `judge` and `scaler.update()`
after `apply`, in place of `scaler.step`.
"""

# torch documents its multi-tensor functions without exporting them to type checkers.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from fastkd.errors import RunFailed
from fastkd.training.optim import skip_aware

__all__ = ["Guard", "keep_where_", "live_buffers"]

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Guard:
    """Watches one module and its optimizer.

    A bad step must not change the buffers of `module`, except `ignore_buffers`, named as in
    `named_buffers` (copying memory banks, which only `LossTerm.commit` writes, would be wasted
    work). A buffer that is replaced during a step rather than written to is covered as long as it
    keeps its shape and type. `max_skips` is the number of consecutive bad steps that a run may
    have. `on_device` undoes a bad step without a host synchronisation; default on every device
    except a CPU, where a synchronisation costs nothing. With `world_size` above 1 the default
    process group must exist, and all ranks must call `judge` equally often.

    Raises:
        ValueError: a name in `ignore_buffers` is not a buffer of the module.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        max_skips: int,
        world_size: int = 1,
        ignore_buffers: Sequence[str] = (),
        on_device: bool | None = None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.max_skips = max_skips
        self.world_size = world_size
        device = optimizer.param_groups[0]["params"][0].device
        # Consecutive bad steps, all bad steps, longest series of bad steps.
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._on_device = device.type != "cpu" if on_device is None else on_device
        self._skip_aware = skip_aware(optimizer)
        self._buffers = live_buffers(module, ignore=ignore_buffers)
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember the module's buffers as they are now."""
        buffers = self._buffers()
        if not self._saved:
            self._saved = [torch.empty_like(buffer) for buffer in buffers]
        for current, saved in _by_dtype(buffers, self._saved):
            torch._foreach_copy_(saved, current)

    @torch.no_grad()
    def undo_step(self) -> None:
        """Put back the buffers of a step that was interrupted; it did not come to the optimizer."""
        for current, saved in _by_dtype(self._buffers(), self._saved):
            torch._foreach_copy_(current, saved)

    @torch.no_grad()
    def judge(
        self, losses: Tensor, grads: Iterable[Tensor], clip_norm: float | None = None
    ) -> Tensor:
        """Whether this step is good: a 0-dim bool on the device, equal on all ranks.

        `losses` is the rank's own loss, 0-dim, summed over micro-batches; `grads` are the
        gradients after their reduction over the ranks. With `clip_norm` they are scaled in place
        so that their global norm is at most that. A norm that overflows fp32 counts as bad.
        """
        gradients = list(grads)
        norm = get_total_norm(gradients).to(losses.device)
        ok = torch.isfinite(losses.detach()) & torch.isfinite(norm)
        if self.world_size > 1:
            num_bad = (~ok).float()
            dist.all_reduce(num_bad)
            ok = num_bad == 0
        if clip_norm is not None and gradients:
            # Like torch.nn.utils.clip_grad_norm_, which would compute the norm a second time.
            scale = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, scale)
        return ok

    @torch.no_grad()
    def apply(self, ok: Tensor) -> None:
        """Step the optimizer if `ok`, else restore the buffers; count the step."""
        buffers = self._buffers()
        if not self._on_device:
            if ok:
                self.optimizer.step()
            else:
                self.undo_step()
        else:
            self._step_on_device(ok)
            keep_where_(ok, buffers, self._saved)
        bad = (~ok).long()
        consecutive, total, longest = self._counts.unbind()
        consecutive.add_(bad).mul_(bad)
        total.add_(bad)
        torch.maximum(longest, consecutive, out=longest)

    def counts(self) -> tuple[int, int]:
        """Current number of bad steps in a row, and of all bad steps. Waits for the device."""
        consecutive, total, _ = self._counts.tolist()
        return consecutive, total

    def check(self) -> tuple[int, int]:
        """`counts`, called where metrics are fetched and before a checkpoint is written.

        Raises:
            RunFailed: more than `max_skips` consecutive steps were bad at any time of the run: the
                outcome does not depend on how often this is called.
        """
        consecutive, total, longest = self._counts.tolist()
        if longest > self.max_skips:
            raise RunFailed(
                f"{longest} steps in a row had a loss or a gradient that was not finite (at most "
                f"{self.max_skips} are skipped; {total} so far in this run). None of them changed "
                "the weights. Lower the learning rate (optim.lr; in Python lr), clip the "
                "gradients, or use precision fp32"
            )
        return consecutive, total

    def never_good(self) -> RunFailed:
        """The message for a run without a single good step, equal on all ranks."""
        return RunFailed(
            f"nothing was learned: every step ({self.counts()[1]}) had a loss or a gradient "
            "that was not finite. Look for NaN in the images and the networks' weights, lower "
            "the learning rate (optim.lr; in Python lr), or use precision fp32"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The counters; the saved buffers live for one step only."""
        return {"counts": self._counts.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue counting from a checkpoint."""
        self._counts.copy_(state["counts"])

    def _step_on_device(self, ok: Tensor) -> None:
        if self._skip_aware:
            self.optimizer.found_inf = (~ok).float()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
            del self.optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        # Host synchronisation: LAMB, apex and unfused optimizers cannot skip on the device.
        elif ok.item():
            self.optimizer.step()


def live_buffers(module: nn.Module, *, ignore: Sequence[str] = ()) -> Callable[[], list[Tensor]]:
    """A cheap function that lists the module's buffers, each once, as they are when it is called.

    It remembers where each buffer is stored, not the buffer: a module may replace it.
    """
    slots: dict[int, tuple[dict[str, Tensor | None], str]] = {}
    ignored = {id(buffer) for buffer in map(module.get_buffer, _known_buffers(module, ignore))}
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if id(buffer) not in ignored:
                slots[id(buffer)] = (owner._buffers, name)

    def buffers() -> list[Tensor]:
        return [buffer for owner, name in slots.values() if (buffer := owner[name]) is not None]

    return buffers


def keep_where_(keep: Tensor, current: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Set every tensor of `current` to its counterpart in `other` if `keep` (0-dim) is false.

    Works in place and on the device, a handful of launches for any number of tensors. Computed on
    the bit patterns as integers, other + keep * (current - other), which wraps round and is exact:
    the same sum in floats would propagate a NaN.
    """
    for group, other_group in _by_dtype(current, other):
        bits = [_as_integer(tensor) for tensor in group]
        other_bits = [_as_integer(tensor) for tensor in other_group]
        torch._foreach_sub_(bits, other_bits)
        torch._foreach_mul_(bits, keep.to(bits[0].dtype))
        torch._foreach_add_(bits, other_bits)


def _known_buffers(module: nn.Module, names: Sequence[str]) -> Sequence[str]:
    known = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"these are not buffers of the module: {', '.join(unknown)}")
    return names


def _by_dtype(
    first: Sequence[Tensor], second: Sequence[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of equal-typed lists: one foreach launch takes only one dtype."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for one, other in zip(first, second, strict=True):
        ones, others = groups.setdefault(one.dtype, ([], []))
        ones.append(one)
        others.append(other)
    return list(groups.values())


def _as_integer(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])
