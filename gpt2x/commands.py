"""Commands that are printed: they work as they are printed, in the present directory and outside the environment."""

import os
import shlex
import shutil
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def shell_command(name: str, *arguments: str | Path) -> str:
    """A command line that runs one of the scripts by the interpreter of this process.

    Args:
        name: of the script, without its suffix.
        *arguments: its words, which are quoted for a shell.
    """
    return _line(_interpreter(), _from_here(_ROOT / "scripts" / f"{name}.py"), *arguments)


def tool(name: str, *arguments: str) -> str:
    """A command line that runs a program of a library, which lies beside the interpreter of this process."""
    return _line(_program(Path(sys.executable).with_name(name)), *arguments)


def install(*requirements: str) -> str:
    """A command line that installs into the environment of this process."""
    return _line(_interpreter(), "-m", "pip", "install", *requirements)


def install_extra(extra: str) -> str:
    """The same for the libraries of an extra of setup.cfg."""
    return install("-e", f"{_from_here(_ROOT)}[{extra}]")


def _line(*words: str | Path) -> str:
    return " ".join(shlex.quote(str(word)) for word in words)


def _interpreter() -> str:
    return "python" if _is_found(Path(sys.executable), "python") else _program(Path(sys.executable))


def _program(path: Path) -> str:
    """A program's name, where a shell finds it by that, else its path."""
    return path.name if _is_found(path, path.name) else _from_here(path)


def _is_found(path: Path, name: str) -> bool:
    """Whether this very program is found by a name. Links are not followed: one of them makes the environment."""
    found = shutil.which(name)
    if found is None:
        return False
    here, there = (Path(os.path.abspath(program)) for program in (path, found))
    # an environment's python and python3 are links in one folder, and start the same
    return here.parent == there.parent and here.resolve() == there.resolve()


def _from_here(path: Path) -> str:
    """A path below the working directory as it is seen from there, any other one absolute."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
