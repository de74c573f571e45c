"""Why a shard as a whole is refused: codes that summaries, reports and the README share."""

from typing import Literal

from acsr_ray.corpus.sources import CorpusError

ParquetCode = Literal[
    "not_parquet",
    "encrypted",
    "footer_too_large",
    "unsupported_schema",
    "extension_type",
    "no_image_column",
    "wrong_type",
    "purified_before",
]
"""It is another format; is encrypted; has a footer longer than the limit; columns of kinds that no corpus
here needs, too many or too deeply nested; columns of Arrow extension types; has no image column; one that
holds no bytes; was purified before."""

TarCode = Literal[
    "not_tar",
    "trailing_data",
    "unsafe_member",
    "unsafe_name",
    "duplicate_member",
    "several_images",
    "scattered_sample",
    "bad_text",
]
"""It is another format; goes on behind its end mark; has a member that is no plain file, or a header that
readers take in different ways; a name that is absolute, climbs, is no UTF-8 or too long; one sample with two
members of the same extension; with several images; with members in several places; with text that is no
UTF-8, or a class that is no whole number."""

ContainerCode = Literal["truncated", "too_large", "unreadable"] | ParquetCode | TarCode
"""It ends early; has more rows, parts or bytes than the limits; is damaged; or one of the others."""


class ContainerError(CorpusError):
    """A shard that is refused; the message names it.

    Args:
        code: why, one of `ContainerCode`.
        message: for people.
    """

    def __init__(self, code: ContainerCode, message: str) -> None:
        # Both are arguments, so that it can travel between processes.
        super().__init__(code, message)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])
