"""Where compiled code fails, the run goes on without torch.compile, or ends in one sentence.

Flow: the trainer runs its compiled units through a `Fallback`. A graph fails in the first step,
before any weight has changed: the step is undone and repeated eagerly.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from fastkd.compute.compiling import CompileReason, not_compiled
from fastkd.errors import FastKDError
from fastkd.printable import in_words

__all__ = ["Fallback"]

T = TypeVar("T")


def _nothing() -> None:
    pass


class Fallback:
    """Runs work that may be compiled, and from its first failure on eagerly.

    decisions: its `compile` becomes "off" then, so that a resumed run computes alike. compiled:
    whether anything is. reason: who wants it; if not auto, the failure is a UserError. All ranks
    compile the same graphs, so they fail together.
    """

    def __init__(
        self,
        decisions: dict[str, str],
        *,
        compiled: bool,
        reason: CompileReason,
        say: Callable[[str], None],
    ) -> None:
        self._decisions = decisions
        self._compiled = compiled
        self._reason: CompileReason = reason
        self._say = say
        self._stopped = False

    def run(self, work: Callable[[], T], undo: Callable[[], None] = _nothing) -> T:
        """`work()`; if it fails as compiled code, but not without, its result without.

        undo: puts back what a failed `work` may have changed.
        """
        if self._stopped:
            return _eagerly(work)
        try:
            return work()
        except FastKDError:
            raise
        except Exception as error:
            if not self._compiled:
                raise
            self._stopped = True
            undo()
            why = in_words(error)[:200]
        # Outside the handler: if it fails here too, that error is the whole story.
        result = _eagerly(work)
        # Only now is it known that compiling is to blame.
        self._say(not_compiled(f"torch.compile failed ({why})", self._reason))
        self._decisions["compile"] = "off"
        return result


def _eagerly(work: Callable[[], T]) -> T:
    """`work()` without what is compiled; other runs of this process go on as they are."""
    with torch.compiler.set_stance("force_eager"):
        return work()
