"""Files of ours: written whole or not at all, read back with suspicion, by one writer at a time.

*Writing*: under a unique temporary name beside the target, flushed to the disk, renamed. After a power cut a name has
its old content or its new, never a part of it, and nothing is removed that was not made here.

*Reading*: what is no regular file, too large, no strict JSON or YAML or of another shape is a DamagedError, whatever
is wrong with it. Whoever reads decides whether something older serves.

*Locks*: the kernel's on one machine, free with its owner's death; a lease with a heartbeat between machines.
"""

import hashlib
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from filelock import FileLock, LeaseSettingsMismatch, SoftFileLease, Timeout
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError

from gpt2x.errors import UserError

Shape = TypeVar("Shape")
# Records of ours that grow with a run are read line by line; of the rest nothing comes near this.
MAX_BYTES = 64_000_000
# How long a lease without a heartbeat keeps other machines out; all of them must know the same number.
LEASE_S = 30.0
# A wait that is over before is not worth a line.
SILENT_S = 1.0
_TEMPORARY = re.compile(r".+\.tmp-[0-9a-f]{8}")


# --- writing ---------------------------------------------------------------------------------------------------------


class UnwritableError(UserError):
    """A file or directory that could not be written; the message names it, why, and what to do.

    Attributes:
        path: what was to be written.
        reason: why it could not, in the system's words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path} could not be written ({reason}); mend that, and the same command tries again.")


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Turns what the system and safetensors raise in the block into an UnwritableError of this path."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not _is_about(Path(os.fsdecode(error.filename)), path)
        where = f": {os.fsdecode(error.filename)}" if elsewhere else ""
        raise UnwritableError(path, f"{error.strerror or error}{where}") from error
    except SafetensorError as error:
        raise UnwritableError(path, str(error)) from error


def _is_about(named: Path, path: Path) -> bool:
    """Whether a name is that of path, or of something temporary that stands for it."""
    return any(part == path.name or part.startswith(f"{path.name}.tmp-") for part in named.parts)


def make_directory(directory: Path) -> None:
    """Makes a directory and its parents, durably; one that is there stays as it is."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    with unwritable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync(path.parent)


def write_file(file: Path, content: bytes | Iterable[bytes | memoryview]) -> str:
    """Writes a file, or replaces it: a crash leaves the old content or the new.

    Args:
        file: in a directory that exists.
        content: all of it, or its pieces one after the other.

    Returns:
        The sha256 of the content, in hexadecimal.

    Raises:
        UnwritableError: where it cannot be written; then nothing of it is left.
    """
    temporary, digest = _temporary(file), hashlib.sha256()
    with unwritable(file):
        try:
            with temporary.open("xb") as stream:
                for piece in [content] if isinstance(content, bytes) else content:
                    stream.write(piece)
                    digest.update(piece)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(file.parent)
    return digest.hexdigest()


@contextmanager
def whole_directory(target: Path, *, replaces: bool = False, joins: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `target`, which takes its name when the block has succeeded and all of it is
    on the disk. Its files then have the mode that the umask gives, which safetensors' own have not.

    Args:
        target: not there yet, or empty; its parent exists.
        replaces: whether a directory of this name gives way, once its successor is whole on the disk.
        joins: whether a directory of this name stays and gets the new files one by one, each in place of its
            predecessor; what else is in it is not touched.

    Raises:
        UnwritableError: where it cannot be written, and where something of that name is there; then nothing of it is
            left, and what was there before is.
    """
    temporary = _temporary(target)
    with unwritable(target):
        temporary.mkdir()
        try:
            yield temporary
            _settle(temporary)
            if joins and target.is_dir():
                _join(temporary, target)
            elif replaces and os.path.lexists(target):
                former = _temporary(target)
                target.rename(former)
                temporary.rename(target)
                sync(target.parent)
                discard(former)
            else:
                temporary.rename(target)
                sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _join(made: Path, target: Path) -> None:
    """Moves the files of a directory to those of another; `config.json`, by which readers find the others, last."""
    files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: (file.name == "config.json", file)):
        make_directory((target / file).parent)
        (made / file).replace(target / file)
        sync((target / file).parent)
    shutil.rmtree(made)


def append_line(file: Path, line: bytes) -> None:
    """Appends to a regular file, in one piece so that a kill tears the last line at most; see sync.

    Raises:
        UnwritableError: where it cannot be written.
    """
    with unwritable(file), open(file, "ab", opener=_without_waiting) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise UnwritableError(file, "it is no regular file")
        stream.write(line + b"\n")


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # a FIFO would wait for who opens its other end


def _settle(directory: Path) -> None:
    """Brings everything in a directory that was just made to the disk, with the mode that the umask gives."""
    file_mode = stat.S_IMODE(directory.stat().st_mode) & 0o666  # mkdir has applied the umask
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            path.chmod(file_mode)
        sync(path)
    sync(directory)


# --- removing --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1000)
def tell_once(text: str) -> None:
    """Says on stderr what is no reason to end anything; the same text only once."""
    print(text, file=sys.stderr, flush=True)


def discard(path: Path) -> None:
    """Removes a file or directory of ours that is no longer needed. What cannot be removed is told once: that is no
    reason to end anything."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        tell_once(f"{path} could not be removed ({error.strerror}); delete it yourself.")


def retire(path: Path) -> None:
    """Removes a directory of ours so that a kill, or a parent that may not be written to, leaves it whole or nothing
    of its name."""
    former = _temporary(path)
    try:
        path.rename(former)
    except OSError as error:
        tell_once(f"{path} could not be removed ({error.strerror}); delete it yourself.")
    else:
        discard(former)


def set_aside(path: Path) -> Path:
    """Gives what may be somebody's another name, `….kept-1` or the next that is free, and returns it.

    Raises:
        UnwritableError: where it cannot be renamed.
    """
    names = (path.with_name(f"{path.name}.kept-{number}") for number in count(1))
    kept = next(name for name in names if not os.path.lexists(name))
    with unwritable(path):
        path.rename(kept)
        sync(path.parent)
    return kept


def remove_leftovers(directory: Path, name: str = "*") -> None:
    """Removes what writers that were killed have left under temporary names; the caller is the only writer of these.

    Args:
        directory: where they wrote.
        name: a pattern of the names that they were to become.
    """
    for path in sorted(directory.glob(f"{name}.tmp-*")):
        is_ours = _TEMPORARY.fullmatch(path.name) and not path.is_symlink()
        if is_ours and (path.is_dir() or path.is_file()):
            discard(path)


# --- reading ---------------------------------------------------------------------------------------------------------


class DamagedError(Exception):
    """A file of ours that is not what we wrote: missing, cut, of another kind or shape. The message says which."""


def read_bytes(file: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file; never waits, whatever lies there.

    Raises:
        DamagedError: where there is none, or a larger one.
    """
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise DamagedError(f"{file} has {size:,} bytes, more than {max_bytes:,}")
        return stream.read()


@contextmanager
def opened(file: Path) -> Iterator[BufferedReader]:
    """A regular file, open for reading; never waits, whatever lies there.

    Raises:
        DamagedError: where there is none, and where the block cannot read it.
    """
    try:
        with open(file, "rb", opener=_without_waiting) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise DamagedError(f"{file} is no regular file")
            yield stream
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DamagedError(f"{file} {reason}") from error


def read_json(file: Path, shape: type[Shape], *, max_bytes: int = MAX_BYTES) -> Shape:
    """A JSON file of ours.

    Args:
        file: where it is.
        shape: what it must be: a TypedDict, or a type such as dict[str, int]. Other keys of a TypedDict are kept.
        max_bytes: its size at most.

    Raises:
        DamagedError: for anything else.
    """
    return parse_json(read_bytes(file, max_bytes=max_bytes), shape, where=str(file))


def parse_json(content: bytes, shape: type[Shape], *, where: str) -> Shape:
    """Strict JSON (no NaN, no torn character, at most 200 levels deep) of a shape; see read_json."""
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise DamagedError(f"{where} is no JSON ({error})") from error
    return checked(value, shape, where=where)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file of ours: one mapping of plain values.

    Raises:
        DamagedError: for anything else.
    """
    content = read_bytes(file, max_bytes=1_000_000)
    try:
        value = yaml.load(content, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DamagedError(f"{file} is no YAML ({' '.join(str(error).split())[:200]})") from error
    return checked(value, dict[str, Any], where=str(file))


def read_records(
    file: Path, shape: type[Shape], *, tell: Callable[[str], None] = lambda _reason: None
) -> Iterator[Shape]:
    """The lines of a file that is appended to, one JSON value each, without those that are not of this shape: a
    killed run may tear one. A file that is missing has none.

    Args:
        file: where it is.
        shape: what each line must be; see read_json.
        tell: is told of each line that is passed over.

    Raises:
        DamagedError: where something else than a regular file has its name.
    """
    if not os.path.lexists(file):
        return
    for number, line in enumerate(read_bytes(file, max_bytes=sys.maxsize).split(b"\n"), start=1):
        try:
            if line.strip():
                yield parse_json(line, shape, where=f"{file}:{number}")
        except DamagedError as error:
            tell(str(error))


class _PlainLoader(yaml.SafeLoader):
    """Without anchors, by which a small file can mean a huge one; what we write has none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which gpt2x never writes")
        return super().compose_node(parent, index)


@lru_cache(maxsize=64)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def checked(value: Any, shape: type[Shape], *, where: str) -> Shape:
    """A value that was read, if it has a shape; see read_json.

    Raises:
        DamagedError: where it has another.
    """
    try:
        _adapter(cast(Any, shape)).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"{key}: " for key in first["loc"][-1:])
        raise DamagedError(f"{where} is not as gpt2x writes it ({place}{first['msg']})") from error
    return value


# --- locks -----------------------------------------------------------------------------------------------------------


class BusyError(Exception):
    """Another process has a lock; the message says which, as far as it is known."""


@contextmanager
def locked(file: Path, *, waits: bool = False) -> Iterator[SoftFileLease]:
    """Has a lock while the block runs.

    Args:
        file: of the lock, in a directory that exists. Beside it lies the lease, `….lease`, which names the owner.
        waits: whether to wait for a living owner, however long that takes; after a moment it is said for whom.

    Returns:
        The lease: its `compromise` is set where this process stood still for so long that another machine took over.

    Raises:
        BusyError: where a living process has it. One on another machine shows that it lives by its heartbeat, for
            which this waits LEASE_S at most.
        UnwritableError: where the file cannot be made.
    """
    # Whichever thread ends what has the lock gives it free.
    kernel = FileLock(file, thread_local=False)
    lease = SoftFileLease(file.with_suffix(".lease"), lease_duration=LEASE_S, thread_local=False)
    with unwritable(file), ExitStack() as stack:
        _acquire(kernel, file, lease, patience_s=-1 if waits else 0)
        stack.callback(kernel.release)
        _remove_nobodys(lease)
        try:
            _acquire(lease, file, lease, patience_s=1.2 * LEASE_S)
        except BusyError:
            if lease.owner is None:  # what a power cut has left of it, of which nobody gives a sign of life
                Path(lease.lock_file).unlink(missing_ok=True)
            elif not waits:
                raise
            _acquire(lease, file, lease, patience_s=-1 if waits else 0)
        stack.pop_all()
    identity = file.stat().st_ino
    try:
        yield lease
    finally:
        lease.release()
        # Before it is free: whoever has it open then looks for the name again. In a directory that was moved and made
        # anew it is another's.
        with suppress(FileNotFoundError):
            if file.stat().st_ino == identity:
                file.unlink()
        kernel.release()


def _remove_nobodys(lease: SoftFileLease) -> None:
    """Removes a lease that a power cut has left without a name, where no heartbeat has touched it for long."""
    file = Path(lease.lock_file)
    with suppress(FileNotFoundError):
        if lease.owner is None and time.time() - file.lstat().st_mtime > LEASE_S:
            file.unlink()


def _acquire(lock: FileLock | SoftFileLease, file: Path, lease: SoftFileLease, *, patience_s: float) -> None:
    """Waits so long, -1 for ever, and says for whom where that takes more than a moment."""
    try:
        if patience_s:
            with suppress(Timeout):
                lock.acquire(timeout=SILENT_S)
        if not lock.is_locked:
            if patience_s:
                limit = "" if patience_s < 0 else f", for a sign of life, {patience_s:.0f} s at most"
                print(f"waiting for {_owner(lease)}, which has {file}{limit}", file=sys.stderr, flush=True)
            lock.acquire(timeout=patience_s)
    except (Timeout, LeaseSettingsMismatch):
        raise BusyError(_owner(lease)) from None


def _owner(lease: SoftFileLease) -> str:
    owner = lease.owner
    return "another process" if owner is None else f"process {owner.pid} on {owner.hostname}"
