"""The Hugging Face layout of image shards: the image type, and features in the schema's metadata."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pyarrow as pa

from acsr_ray.columns import IMAGE, LABEL

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image_features(
    keys: Sequence[str], class_names: Sequence[str], others: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Return schema metadata that tells Hugging Face readers what the columns are.

    Args:
        keys: string columns before the image.
        class_names: names of the classes of `label`; no label column when empty.
        others: further columns and their types, such as `int64`.
    """
    features: dict[str, object] = {key: {"dtype": "string", "_type": "Value"} for key in keys}
    features[IMAGE] = {"_type": "Image"}
    if class_names:
        features[LABEL] = {"names": list(class_names), "_type": "ClassLabel"}
    features |= {name: {"dtype": kind, "_type": "Value"} for name, kind in others.items()}
    return {"huggingface": json.dumps({"info": {"features": features}})}
