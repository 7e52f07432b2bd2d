"""Names of models and tokenizers: what exists is that, what looks local and is missing is refused with what is there.

A Hub id is what nothing on this machine is called, and is said to be fetched before it is. Everything that comes from
a stranger is loaded through `from_pretrained`, which runs none of its code.
"""

import difflib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError

from gpt2x.addresses import without_secrets
from gpt2x.commands import install, shell_command
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, read_json
from gpt2x.manifest import MANIFEST, damage_of_model
from gpt2x.runs.layout import MODEL, RunLayout, named_checkpoints

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# Folders by whose name nobody means an owner on the Hub, whether they exist yet or not.
_LOCAL = re.compile(
    r"runs|data|models?|exports|checkpoints|final|shards|tokenizers?|tokenization|texts|configuration|scripts|tests|"
    r"benchmarks|docs|outputs?|out|tmp|cache|home|mnt|work"
)
# Where what we make goes, if it is not told otherwise.
_OURS = frozenset(("runs", "data"))
# Of what a library says, which may be a page, without the path that it is about.
MAX_LINE = 210
# How long the Hub may take to say that it is there.
PROBE_S = 10.0
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json", "tekken.json")
_TOKENIZER_PATTERNS = ("*.model", "*.tiktoken")
_FETCHED_FOR_TOKENIZERS = (
    *("*token*.json", "*.jinja", "vocab.*", "merges.txt", "config.json", "tekken.json", *_TOKENIZER_PATTERNS),
)

_said: set[str] = set()


def say(line: str) -> None:
    """Tells something that the user should know, once in a process, beside what is printed."""
    if line not in _said:
        _said.add(line)
        print(without_secrets(line), file=sys.stderr, flush=True)


# --- names -----------------------------------------------------------------------------------------------------------


def local_path(name: str) -> Path:
    """The path that a name is, if it is one; `~` is home."""
    return Path(name).expanduser()


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a repository on the Hub, OWNER/NAME, and of nothing on this machine."""
    if not _HUB_ID.fullmatch(name):
        return False
    owner = name.split("/")[0]
    return not _LOCAL.fullmatch(owner) and not Path(owner).exists()


def does_not_exist(name: str, wanted: str) -> UserError:
    """The complaint about a name that is neither here nor an id: what is there instead, the most similar first."""
    place = local_path(name)
    if place.exists():
        return UserError(f"{name} is a file; give {wanted}.")
    if place.parent.is_dir() and len(place.parts) > 1:
        there = sorted(path.name for path in place.parent.iterdir() if path.is_dir() and path.name[0] != ".")
        if there:
            similar = difflib.get_close_matches(place.name, there, n=8, cutoff=0.3)
            listed = list(dict.fromkeys([*similar, *there]))
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            where = "runs here" if place.parent == Path("runs") else f"in {place.parent} there are"
            return UserError(f"{name} does not exist; {where}: {', '.join(listed[:8])}{more}.")
    if place.parts[:1] == ("runs",) and not Path("runs").exists():
        return UserError(
            f"{name} does not exist; there are no runs here yet, `{shell_command('pretrain')}` makes one."
        )
    return UserError(f"{name} does not exist; give {wanted}.")


def place_to_write(name: str, *, field: str) -> Path:
    """Where something new is written by a name that could also be read as a Hub id.

    Raises:
        UserError: for OWNER/NAME where there is no folder OWNER, and it is none of ours.
    """
    first, _, rest = name.partition("/")
    if _HUB_ID.fullmatch(name) and first not in _OURS and not Path(first).is_dir():
        raise UserError(
            f"{field} ({name}) looks like a Hub id, and something new would be written there; write ./{name} for a "
            f"folder here, or data/{rest}."
        )
    return local_path(name)


# --- models ----------------------------------------------------------------------------------------------------------


def find_model(name: str) -> str:
    """The directory of the model that a name means, or its Hub id.

    Of a run that is its final model, or that of its newest checkpoint; what is damaged is passed over with a line.

    Raises:
        UserError: where there is no such directory, no whole model in it, and no such Hub id.
    """
    directory = local_path(name)
    if not directory.is_dir():
        if directory.exists() or not is_hub_id(name):
            raise does_not_exist(name, "a model's directory, a run's, or a Hub id NAME/MODEL")
        check_hub(name)
        return name
    for candidate in (directory, directory / MODEL):
        if _names_a_model(candidate):
            if (damage := damage_of_model(candidate)) is not None:
                raise UserError(f"{candidate} is damaged ({damage}); restore it, or give another model.")
            return str(candidate)
    return str(_model_of_run(directory))


def _model_of_run(run_dir: Path) -> Path:
    # The manifest is written last: what a killed save left has none, or still has a temporary name.
    candidates = [path / MODEL for path in reversed(named_checkpoints(run_dir)) if (path / MANIFEST).exists()]
    if _names_a_model(final := RunLayout(run_dir).final_dir):
        candidates.insert(0, final)
    damaged: list[str] = []
    for candidate in candidates:
        damage = damage_of_model(candidate)
        if damage is None:
            for line in damaged:
                say(f"{line}; taking {candidate}.")
            return candidate
        damaged.append(f"{candidate} is damaged ({damage})")
    if damaged:
        raise UserError(f"{run_dir} holds no whole model: {'; '.join(damaged)}; train it again, or restore one.")
    raise UserError(f"{run_dir} holds no model: no config.json in it, in final/ or in checkpoints/; train one first.")


def _names_a_model(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))


def base_of(adapters: Path) -> str:
    """The model that adapters belong to: a directory as find_model finds it, or a Hub id.

    A path that is not absolute may also be meant from the adapters' own directory.

    Raises:
        UserError: where it is neither.
    """
    file = adapters / "adapter_config.json"
    try:
        name = read_json(file, dict[str, Any]).get("base_model_name_or_path")
    except DamagedError as error:
        raise UserError(f"{error}; restore it, or give another model.") from error
    if not isinstance(name, str) or not name:
        raise UserError(f"{file} names no base_model_name_or_path; write the model there that they belong to.")
    beside = adapters / name
    if not (beside.is_dir() or local_path(name).is_dir() or is_hub_id(name)):
        raise UserError(
            f"the adapters of {adapters} belong to {name}, which does not exist; put that model there, or correct "
            f"their base_model_name_or_path."
        )
    try:
        return find_model(str(beside) if beside.is_dir() and not local_path(name).is_dir() else name)
    except UserError as error:
        raise UserError(f"the adapters of {adapters} belong to {name}: {error}") from error


# --- tokenizers ------------------------------------------------------------------------------------------------------


def holds_tokenizer(directory: Path) -> bool:
    """Whether there is a tokenizer in a directory, in whichever form."""
    patterns = (*_TOKENIZER_FILES, *_TOKENIZER_PATTERNS)
    return any(any(directory.glob(pattern)) for pattern in patterns)


def check_tokenizer(name: str, *, field: str | None = None) -> None:
    """Raises UserError where a name is neither a directory that holds a tokenizer nor a Hub id; fetches nothing.

    Args:
        name: of the tokenizer.
        field: where the user gave it, for the message.
    """
    directory = local_path(name)
    try:
        if directory.is_dir():
            if not holds_tokenizer(directory):
                raise no_tokenizer(name)
        elif directory.exists() or not is_hub_id(name):
            raise does_not_exist(name, "a tokenizer's directory (scripts/train_tokenizer.py makes one) or a Hub id")
    except UserError as error:
        raise error if field is None else UserError(f"{field}: {error}") from None


def no_tokenizer(name: str) -> UserError:
    """The complaint about a directory without a tokenizer."""
    return UserError(f"{name} holds no tokenizer; train one by scripts/train_tokenizer.py, or correct the path.")


def find_tokenizer(name: str) -> Path:
    """The directory of a tokenizer; one on the Hub is fetched.

    Raises:
        UserError: where there is no such directory and no such Hub id.
    """
    directory = local_path(name)
    if directory.is_dir():
        return directory
    check_tokenizer(name)
    check_hub(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(_FETCHED_FOR_TOKENIZERS)))


# --- the Hub ---------------------------------------------------------------------------------------------------------


def check_hub(repo_id: str) -> None:
    """Says that a model is taken from the Hub or its cache, after one question whether that is possible at all.

    Without a connection the client tries for about a minute; here it is asked once, and from then on this process
    takes everything from the cache.

    Raises:
        UserError: where the Hub does not have it, and where it can be had neither there nor in the cache.
    """
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return _take_from_cache(repo_id, "HF_HUB_OFFLINE is set")
    if any(line.startswith(f"fetching {repo_id} ") for line in _said):
        return None
    try:
        HfApi().model_info(repo_id, timeout=PROBE_S)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != 429:
            raise UserError(
                f"{repo_id} is not on the Hub, or your token may not see it ({status}); correct the name, or give a "
                f"directory."
            ) from error
        reason = f"the Hub answers {status}"
    except (OSError, *_http_errors()) as error:  # type: ignore[misc]
        reason = f"the Hub cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
    else:
        return say(f"fetching {repo_id} from the Hub, as far as it is not in its cache")
    constants.HF_HUB_OFFLINE = True
    return _take_from_cache(repo_id, reason)


def _take_from_cache(repo_id: str, reason: str) -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots"
    if not folder.is_dir():
        raise UserError(
            f"{repo_id} is neither here nor in the Hub's cache, and {reason}; connect, or give a directory."
        )
    say(f"taking {repo_id} from the Hub's cache: {reason}")


def _http_errors() -> tuple[type[BaseException], ...]:
    """Of the HTTP client that huggingface_hub has loaded; which one depends on its version."""
    loaded = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return tuple(module.HTTPError for module in loaded)


# --- loading ---------------------------------------------------------------------------------------------------------


def from_pretrained(auto_class: Any, name_or_path: str | Path, **options: Any) -> Any:
    """What a class of transformers loads from a directory or the Hub; code that lies there is never run.

    Args:
        auto_class: an Auto class, or a model's own.
        name_or_path: as find_model and find_tokenizer return it.
        options: of the class's from_pretrained.

    Raises:
        UserError: for whatever it cannot load, in one line.
    """
    with one_line_of(name_or_path):
        return auto_class.from_pretrained(str(name_or_path), trust_remote_code=False, **options)


@contextmanager
def one_line_of(name_or_path: str | Path) -> Iterator[None]:
    """Turns what a library raises over the files of a stranger into a UserError that names them."""
    if (Path(name_or_path) / "custom_generate" / "generate.py").exists():
        raise _needs_its_code(name_or_path, "custom_generate")
    try:
        yield
    except Exception as error:
        if not _is_about_files(error):
            raise
        line = " ".join(str(error).split())
        if "trust_remote_code" in line:
            raise _needs_its_code(name_or_path, _model_type(name_or_path)) from error
        if "does not recognize this architecture" in line:
            raise UserError(
                f"{name_or_path} ({_model_type(name_or_path)}) is of a type that this version of transformers does "
                f"not know; run `{install('--upgrade', 'transformers')}`, or give another model."
            ) from error
        line = line if str(name_or_path) in line else f"{name_or_path} cannot be loaded: {line}"
        longest = MAX_LINE + len(str(name_or_path))  # a path is as long as it is
        if len(line) > longest:
            line = shorten(line, longest - 40, placeholder=" ...") + "; copy it again, or give another."
        raise UserError(line) from error


def _is_about_files(error: Exception) -> bool:
    """Whether an error is what files of a stranger, damaged ones too, make a library raise.

    transformers checks types in a config by StrictDataclassError, and not all of them; tokenizers raises Exception.
    """
    from huggingface_hub.errors import StrictDataclassError

    kinds = (ValueError, OSError, RuntimeError, ImportError, LookupError, TypeError, AttributeError, ArithmeticError)
    return isinstance(error, (*kinds, SafetensorError, StrictDataclassError)) or type(error) is Exception


def _needs_its_code(name_or_path: str | Path, what: str) -> UserError:
    return UserError(
        f"{name_or_path} ({what}) brings code of its own, which gpt2x never runs; give a model of a type that "
        f"transformers knows, or one written by scripts/export.py --to native, which is read by gpt2x's own code."
    )


def _model_type(name_or_path: str | Path) -> str:
    try:
        content = json.loads((Path(name_or_path) / "config.json").read_bytes())
        return f"model_type {content['model_type']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a type of its own"
