"""What a user may ask of a purifier beyond its bundle: reconstruction, strength, number of clusters."""

from typing import Annotated, Any, Literal

from pydantic import Field

from acsr_ray.config import Described

Reconstruction = Literal["cbpdn", "unrolled"]
Strength = Annotated[float, Field(gt=0)] | Literal["auto"]


class PurifyOptions(Described):
    """How to purify with a bundle. The defaults are the bundle's own ways."""

    reconstruction: Reconstruction | None = None
    """`cbpdn`, the paper's, or `unrolled`, trained on attacks; None: the bundle's default."""
    strength: Strength = 1.0
    """How much is taken away: a factor on lmbda (cbpdn), or on every threshold (unrolled; below 1, the part
    of the change that is made). `auto`: one for each image; unrolled, by how much strength 1 changes
    it (the bundle's `auto_by_change`), and only where that is unusual is it reconstructed again; for cbpdn,
    by its noise level (`auto_strength`). For cbpdn a number scales rho with lmbda, `auto` leaves rho as it
    is: so few iterations end elsewhere, and the same strength takes a little more or less away (of the high
    band 4 % at 0.5, 6 % at 1.5, 11 % at 2 with the bundle cifar10-small)."""
    top_k: int = Field(1, ge=1)
    """Reconstruct with so many nearest clusters and average; 1 is the paper. No effect on an unrolled network
    that all clusters share."""

    def changed(self, default: Reconstruction) -> dict[str, Any]:
        """Return the settings that are not the defaults, as JSON values: what a run's identity depends on.

        Args:
            default: the bundle's own reconstruction, which is the same by name as without it.
        """
        own = {"reconstruction"} if self.reconstruction == default else set()
        return self.model_dump(mode="json", exclude_defaults=True, exclude=own)
