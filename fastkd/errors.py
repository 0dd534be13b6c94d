"""The three ways in which a fastkd program ends early, and the exit code of each.

The rest of fastkd raises these (`kernels` raises ValueError); `fastkd.cli.commands` turns them into
one line on stderr and an exit code. The code of a stop (130, 143, 129) comes from the signal
(`fastkd.training.interrupt`).
"""

from fastkd.printable import printable

__all__ = ["FastKDError", "Interrupted", "RunFailed", "UserError"]


class FastKDError(Exception):
    """Base of all errors whose message is meant for the user, one line for each sentence.

    shared: every rank raises the same error, and rank 0 prints it. False: only this rank has it.
    """

    exit_code = 1

    def __init__(self, *sentences: str, shared: bool = True) -> None:
        # A sentence may quote a file name or a key that somebody else has written.
        super().__init__(*(printable(sentence) for sentence in sentences))
        self.shared = shared

    def __str__(self) -> str:
        return "\n".join(self.args)


class UserError(FastKDError, ValueError):
    """The request cannot be carried out: a wrong key, a missing folder, the wrong class count.

    Also a ValueError, which is what people catch in Python, and what kernels and pydantic's
    validators raise.
    """

    exit_code = 2


class RunFailed(FastKDError):
    """The request was fine, the run was not: non-finite losses, a full disk, a lost rank."""

    exit_code = 1


class Interrupted(FastKDError):
    """Ctrl-C (130), SIGTERM (143) or a closed terminal (129), after the state was saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
