"""Selection for all clusters at once beside a loop over clusters, and codecs beside Pillow."""

import io

import torch
from PIL import Image
from torch import Tensor

from acsr_ray.benchmark.pictures import crops
from acsr_ray.benchmark.report import Row
from acsr_ray.benchmark.timing import alternate, timed
from acsr_ray.corpus.images import DecodeLimits, decode_image, encode_png
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.purifier import Purifier

LATENTS = 4096


def benchmark_selection(bundle: str, *, device: str, repeats: int) -> Row:
    """Return the row of selection; the loop whitens for one cluster after the other."""
    purifier = Purifier(load_bundle(bundle), device)
    gaussians = purifier.gaussians
    clusters, length = gaussians.mean.shape
    latents = torch.randn(LATENTS, length, generator=torch.Generator().manual_seed(0)).to(device)

    def loop() -> Tensor:
        own = latents.double()
        distances = [
            ((own - mean) @ whitening.T).square().sum(1)
            for mean, whitening in zip(gaussians.mean, gaussians.whitening, strict=True)
        ]
        return torch.stack(distances, 1).argmin(1)

    with torch.inference_mode():
        assert torch.equal(loop(), purifier.select(latents).index)
        seconds = alternate(
            {"ours": timed(lambda: purifier.select(latents), device), "loop": timed(loop, device)}, repeats
        )
    return Row(
        "selection",
        f"{clusters} clusters of {length} numbers, float64",
        0,
        LATENTS,
        seconds["ours"] / LATENTS,
        "loop over clusters, whole batch",
        seconds["loop"] / LATENTS,
        flop=2.0 * clusters * length**2,
        bytes=8.0 * clusters * length,
    )


def benchmark_codec(side: int, *, repeats: int) -> list[Row]:
    """Return rows of decoding and encoding one image on one core; the peer is Pillow as it comes."""
    pixels = list(crops(64, side))
    files = [encode_png(image) for image in pixels]
    limits = DecodeLimits()

    def pillow_encode() -> None:
        for image in pixels:
            Image.fromarray(image).save(io.BytesIO(), "PNG")

    def pillow_decode() -> None:
        for data in files:
            Image.open(io.BytesIO(data)).convert("RGB").tobytes()

    seconds = alternate(
        {
            "encode": timed(lambda: [encode_png(image) for image in pixels]),
            "Pillow encodes": timed(pillow_encode),
            "decode": timed(lambda: [decode_image(data, limits) for data in files]),
            "Pillow decodes": timed(pillow_decode),
        },
        repeats,
    )
    size = sum(map(len, files)) / len(files)
    return [
        Row(
            *("codec", f"PNG, {what}", side, len(pixels), seconds[what] / len(pixels), "Pillow's defaults"),
            seconds[f"Pillow {what}s"] / len(pixels),
            note=f"{size:.0f} bytes",
        )
        for what in ("encode", "decode")
    ]
