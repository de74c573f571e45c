"""Numerics of convolutional sparse coding in torch: Tikhonov split, CBPDN, dictionary learning."""

from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig, CbpdnResult
from acsr_ray.sparse.cdl import CdlConfig, learn_dictionary
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split

__all__ = [
    "Cbpdn",
    "CbpdnConfig",
    "CbpdnResult",
    "CdlConfig",
    "TikhonovConfig",
    "learn_dictionary",
    "tikhonov_split",
]
