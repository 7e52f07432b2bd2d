"""Addresses without their secrets: what may be written down, compared and shown."""

import re
from typing import Any, TypeVar
from urllib.parse import unquote_plus

Plain = TypeVar("Plain")

_USER = re.compile(r"(?i)([a-z][a-z0-9+.-]*://)[^\s/?#'\"]*@")
# To the end of the address, which in a text may be followed by the punctuation of the sentence.
_QUERY = re.compile(r"\?([^\s#'\"<>]*?)(?=[).,;:\]]*(?:[\s#'\"<>]|$))")
# Parameters by which an address is signed or opened, and those that change with every signature.
_SECRET = re.compile(
    r"(?i)x-(amz|goog|ms|oss|cos|obs|tos)-.*|.*(signature|secret|passw|pwd|credential|authoriz|oauth|api[-_.]?key|"
    r"access[-_.]?key|session[-_.]?id).*|.*token|awsaccesskeyid|googleaccessid|key-pair-id|policy|expires|sign?|auth|key"
)
# Those of a shared access signature of Azure, which are names like any other where there is no `sig`.
_AZURE = re.compile(r"(?i)s[vspret]|srt?|spr|sip|ses|scid|sdd|sk[tsev]|(sk|sa|su)oid|sktid|si")


def without_secrets(value: Plain) -> Plain:
    """Takes user, password and signature out of every address.

    The same file under another password or a renewed signature has the same address then.

    Args:
        value: a text with or without addresses; or plain data, whose texts are treated alike.
    """
    return _without(value)


def _without(value: Any) -> Any:
    if isinstance(value, str):
        return _QUERY.sub(_public_query, _USER.sub(r"\1", value)) if "://" in value else value
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without(item) for item in value)
    return value


def _public_query(match: re.Match[str]) -> str:
    parts = re.split("[&;]", match[1])
    names = [unquote_plus(part.split("=", 1)[0]) for part in parts]
    is_azure = "sig" in (name.lower() for name in names)
    public = [
        part
        for part, name in zip(parts, names, strict=True)
        if not (_SECRET.fullmatch(name) or (is_azure and _AZURE.fullmatch(name)))
    ]
    if len(public) == len(parts):
        return match[0]
    return f"?{'&'.join(public)}" if public else ""
