"""Downloads that are either complete and of the right digest, or not there."""

import hashlib
import http.client
import urllib.request
from pathlib import Path

from acsr_ray.config import AcsrError

BLOCK_BYTES = 2**20
TIMEOUT_S = 60
"""Longest silence of the server."""


class FetchError(AcsrError, RuntimeError):
    """A download that failed or that has another digest than the one expected."""


def fetch(url: str, target: Path, sha256: str) -> None:
    """Download a file; `target` appears only when its digest is right.

    The bytes go to a temporary file beside the target, so a killed run leaves at most that one, which no
    reader takes for the target and the next run overwrites.

    Args:
        url: http, https or file address.
        target: where; an existing file is replaced, its folder must exist.
        sha256: digest of the content as hex, in either case.

    Raises:
        FetchError: unreachable, interrupted, or of another digest; nothing is left behind.
    """
    if not url.startswith(("http://", "https://", "file://")):
        raise FetchError(f"cannot download {url!r}: it is no http, https or file address")
    staging = target.with_name(f".{target.name}.part")
    try:
        digest, size = _copy(url, staging)
        if digest != sha256.lower():
            raise FetchError(
                f"{url} has SHA-256 {digest} ({size} bytes), expected {sha256.lower()}; nothing was kept"
            )
        staging.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"cannot download {url}: {error}") from error
    finally:
        staging.unlink(missing_ok=True)


def _copy(url: str, staging: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, staging.open("wb") as file:
        while block := response.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            file.write(block)
    return digest.hexdigest(), size
