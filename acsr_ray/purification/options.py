"""What a user may ask of a purifier beyond its bundle: reconstruction, strength, number of clusters."""

from typing import Annotated, Literal

from pydantic import Field

from acsr_ray.config import Described

Reconstruction = Literal["cbpdn", "unrolled"]
Precision = Literal["float32", "bfloat16"]
Strength = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"]


class PurifyOptions(Described):
    """How to purify with a bundle. The defaults are the bundle's own ways."""

    reconstruction: Reconstruction | None = None
    """`cbpdn`, the paper's, or `unrolled`, trained on attacks; None: the bundle's default."""
    strength: Strength | None = None
    """How much is taken away: a factor on lmbda (cbpdn), or on the change that the network makes (unrolled).
    `auto`: one for each image; unrolled, by the network's response to its own output where the bundle says
    so, which costs a second pass, else by the noise level. None: the bundle's default."""
    top_k: int = Field(1, ge=1)
    """Reconstruct with so many nearest clusters and average; 1 is the paper. No effect on an unrolled network
    that all clusters share."""
    precision: Precision = "float32"
    """Of the unrolled network. `bfloat16` takes less than half the time on CPUs that compute in it, and
    moves pixels by a third of a level in the mean square, single ones of photos by up to a dozen. No effect
    on cbpdn."""
