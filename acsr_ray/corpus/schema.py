"""The Hugging Face layout of image shards: the image type, and features in the schema's metadata."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from acsr_ray.columns import IMAGE, LABEL

FEATURES_KEY = b"huggingface"
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


def extend_features(schema: pa.Schema, like: dict[str, str]) -> pa.Schema:
    """Return a schema whose Hugging Face features, where it has some, name all of its columns.

    What the metadata say of the columns that they name stays as it is, in its order, as does all else in
    them. Input without features stays without: what its columns are is then for the reader to find out, of
    ours as of its own.

    Args:
        schema: with the metadata of the input, and columns behind its own.
        like: columns that are of another column's feature, such as a copy of the image.
    """
    metadata = dict(schema.metadata or {})
    described = _described(metadata.get(FEATURES_KEY, b""))
    if described is None:
        return schema
    content, features = described
    for field in schema:
        feature = features.get(like.get(field.name, ""), _value_feature(field.type))
        if field.name not in features and feature is not None:
            features[field.name] = feature
    return schema.with_metadata({**metadata, FEATURES_KEY: json.dumps(content).encode()})


def _described(text: bytes) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the whole content and the features within it, None where there are none that can be read."""
    try:
        content = json.loads(text)
        features = content["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return None
    return (content, features) if isinstance(features, dict) and features else None


def _value_feature(kind: pa.DataType) -> dict[str, str] | None:
    """Return the feature of a plain column, None for one of another kind."""
    names = {pa.string(): "string", pa.int32(): "int32", pa.float32(): "float32"}
    return {"dtype": names[kind], "_type": "Value"} if kind in names else None
