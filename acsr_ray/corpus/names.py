"""Names of shards as names of outputs: safe on every store, and never one name for two shards.

Keys of an object store may hold `..`, empty parts, backslashes and control characters, and be longer than a
file name. A part of a path that is safe stays as it is; another becomes a readable beginning, `~` and a
digest of the part.
"""

import hashlib
import re
import unicodedata

MAX_PART_BYTES = 180
"""Longest part in UTF-8. File systems take 255 bytes, and an output's name adds rows, key, suffix and, while
it is written, a mark of its own: about 60."""
MAX_PATH_BYTES = 600
"""Longest path in UTF-8. Object stores take 1,024 bytes, the output's own folder included."""
READABLE = 60
"""Characters of an unsafe name that stay readable."""
DIGEST_DIGITS = 20

# What Windows and SMB shares refuse in a name, the backslash first, which is a separator there.
FORBIDDEN = frozenset('\\:*?"<>|')
HASHED = re.compile(rf"~[0-9a-f]{{{DIGEST_DIGITS}}}\Z")
KEPT = re.compile(r"[^0-9A-Za-z._=+ -]+")


def safe_name(path: str) -> str:
    """Return a relative path with every unsafe part replaced; a safe path is returned as it is.

    A part is unsafe when it is empty or longer than `MAX_PART_BYTES`, begins with a dot or an underscore
    (which readers take for hidden), ends with a dot or a space, has characters that cannot be printed or that
    some file system refuses, is not in Unicode's composed form (NFC), or looks like a replaced one.

    Args:
        path: parts separated by `/`; any characters, lone surrogates included.
    """
    parts = [part if _is_safe(part) else _hashed(part) for part in path.split("/")]
    name = "/".join(parts)
    if len(name.encode()) <= MAX_PATH_BYTES:
        return name
    return _hashed(path)


def _is_safe(part: str) -> bool:
    return (
        part.isprintable()
        and 0 < len(part.encode()) <= MAX_PART_BYTES
        and part[0] not in "._"
        and part[-1] not in ". "
        and FORBIDDEN.isdisjoint(part)
        and unicodedata.is_normalized("NFC", part)
        and not HASHED.search(part)
    )


def _hashed(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_DIGITS]
    readable = KEPT.sub("-", text.rsplit("/", 1)[-1])[:READABLE].strip("._ -")
    return f"{readable}~{digest}"
