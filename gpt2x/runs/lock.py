"""One writer per run directory, for as long as it is there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLease

from gpt2x import files
from gpt2x.errors import UserError

# What the lock leaves in the directory while it is held, and after a kill.
LOCK_NAMES = ("run.lock", "run.lease")


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A run directory that this process has to itself.

    Attributes:
        path: the directory.
        identity: device and number of its inode, by which it is known whatever its name.
        lease: what other machines see of the lock.
    """

    path: Path
    identity: tuple[int, int]
    lease: SoftFileLease

    def check(self) -> None:
        """Raises UserError where the directory is no longer there, or no longer this process's."""
        try:
            is_there = _identity(self.path) == self.identity
        except OSError:
            is_there = False
        if not is_there:
            raise UserError(
                f"{self.path} was moved or removed while the run was writing to it, and nothing is made anew there; "
                f"bring it back, or set run.dir and run.name to where it is, and the same command goes on."
            )
        if self.lease.compromise is not None:
            raise UserError(
                f"{self.path} was taken over by another process, since this one gave no sign of life for "
                f"{files.LEASE_S:.0f} s; see that only one of them runs."
            )


@contextmanager
def locked(run_dir: Path) -> Iterator[Hold]:
    """Has a run directory to itself while the block runs.

    Args:
        run_dir: made where it is missing.

    Raises:
        UserError: where another process has it, and where the directory cannot be written to.
    """
    with ExitStack() as stack:
        try:
            files.make_directory(run_dir)
            lease = stack.enter_context(files.locked(run_dir / LOCK_NAMES[0]))
            hold = Hold(path=run_dir, identity=_identity(run_dir), lease=lease)
        except files.BusyError as error:
            raise UserError(
                f"{run_dir} is being written by {error}; wait for it, or start another run with --run.name NAME."
            ) from error
        except files.UnwritableError as error:
            raise UserError(
                f"{run_dir} cannot be written to ({error.reason}); make it writable, or set run.dir."
            ) from error
        yield hold


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
