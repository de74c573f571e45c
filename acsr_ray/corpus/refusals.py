"""Why an image is refused: the codes that a quarantined row shows in `acsr_reason`."""

from typing import Literal, get_args

Reason = Literal[
    "null_image",
    "empty",
    "too_large",
    "unsupported_format",
    "decode_error",
    "decoder_crash",
    "decoder_timeout",
    "decoder_memory",
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class ImageError(ValueError):
    """An image that cannot be used; `reason` is one of `REASONS`."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: Reason = reason
        self.detail = detail
