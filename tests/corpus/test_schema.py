"""Hugging Face features: those of the input stay as they are, the added columns get theirs."""

import json

import pyarrow as pa
import pytest

from acsr_ray.columns import DOUBT, ORIGINAL, OUTCOME
from acsr_ray.corpus.schema import IMAGE_TYPE, extend_features

FEATURES = {
    "label": {"names": ["a", "b"], "_type": "ClassLabel"},
    "picture": {"mode": "RGB", "_type": "Image"},
    "gone": {"dtype": "int64", "_type": "Value"},
}


def written(content, *more):
    fields = [("picture", IMAGE_TYPE), ("label", pa.int64()), *more, *OUTCOME]
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return pa.schema(fields, metadata={b"huggingface": text, b"other": b"kept"})


def test_added_columns_are_described_and_nothing_else_changes():
    content = {"info": {"license": "mine", "features": FEATURES}, "fingerprint": "f"}
    schema = written(content, (DOUBT, pa.float32()), (ORIGINAL, IMAGE_TYPE))
    extended = extend_features(schema, {ORIGINAL: "picture"})
    assert extended.equals(schema)  # but for the metadata
    assert extended.metadata[b"other"] == b"kept"
    found = json.loads(extended.metadata[b"huggingface"])
    features = found["info"].pop("features")
    assert found == {"info": {"license": "mine"}, "fingerprint": "f"}
    assert list(features)[:3] == list(FEATURES)
    assert {name: features[name] for name in FEATURES} == FEATURES
    assert {name: features[name] for name in features.keys() - FEATURES.keys()} == {
        "acsr_status": {"dtype": "string", "_type": "Value"},
        "acsr_reason": {"dtype": "string", "_type": "Value"},
        "acsr_class": {"dtype": "int32", "_type": "Value"},
        "acsr_cluster": {"dtype": "int32", "_type": "Value"},
        "acsr_distance": {"dtype": "float32", "_type": "Value"},
        "acsr_residual": {"dtype": "float32", "_type": "Value"},
        DOUBT: {"dtype": "float32", "_type": "Value"},
        ORIGINAL: {"mode": "RGB", "_type": "Image"},
    }


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"info": {}},
        {"info": None},
        {"info": {"features": None}},
        {"info": {"features": {}}},
        [],
        b"\xff{",
        b"",
    ],
)
def test_metadata_without_features_stay(content):
    schema = written(content)
    assert extend_features(schema, {}).metadata == schema.metadata
    bare = schema.remove_metadata()
    assert extend_features(bare, {}).metadata is None
