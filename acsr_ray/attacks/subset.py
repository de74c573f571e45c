"""Models with state per image, and attacks that go on with some of the images only."""

from collections.abc import Callable

from torch import Tensor

Model = Callable[[Tensor], Tensor]


def subset_model(model: Model, index: Tensor) -> Model:
    """Return the model for some rows of the batch.

    A model that holds something for each image of the batch (a base image, a chosen dictionary) has a method
    `rows(index)` that returns the model for those rows; any other model serves every row alike.

    Args:
        model: images to logits.
        index: (M,) int64 positions among the images that the model now serves.
    """
    rows = getattr(model, "rows", None)
    return rows(index) if callable(rows) else model
