"""Errors of a run that its settings alone do not explain; the command line exits with status 1 for them."""

from __future__ import annotations

import errno
from pathlib import Path

from zoo.kernels.errors import ZooError


class RunError(ZooError):
    """A run could not go on."""

    exit_status = 1


class NonFiniteError(RunError):
    """A loss or gradient became infinite or NaN; the update that it would have caused was not applied."""

    def __init__(self, step: int, what: str, layer: str, hint: str = "") -> None:
        self.step, self.what, self.layer = step, what, layer
        super().__init__(f"step {step}: {what} is not finite, first seen in {layer}{hint}")

    def with_hint(self, kept: str) -> NonFiniteError:
        """The same error, with what was kept and the mend."""
        return NonFiniteError(self.step, self.what, self.layer, f"; {kept}: lower optim.lr or look at the data")


def foreseen(error: BaseException, when: str = "", folder: Path | None = None) -> RunError | None:
    """The error that another library's exception stands for where memory or the disk is full; None for any other.

    Args:
        error: What was raised; those that it was raised from count too.
        when: Put behind what happened, such as " after step 3".
        folder: Where it was written to, if known.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        text = str(link)
        if isinstance(link, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
            return RunError(
                f"out of memory{when}: lower data.batch_size and raise trainer.accumulate instead, or take a smaller "
                f"model"
            )
        if getattr(link, "errno", None) in _OUT_OF_ROOM or "No space left on device" in text:
            path = folder or getattr(link, "filename", None)
            place = f" ({path})" if path else ""
            return RunError(f"the disk is full{when}{place}: make room, then go on with the same command, resume=true")
    return None


# torch.OutOfMemoryError, numpy, and the allocator of torch's CPU tensors.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "Unable to allocate")
_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Interrupted(KeyboardInterrupt):
    """A run was ended by a signal, with everything written that resume=true needs."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"interrupted after step {step}: the same command with resume=true goes on in {folder}")
