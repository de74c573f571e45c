"""The unrolled network as purification runs it beside one plain call of it, and the encoder."""

from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from acsr_ray.benchmark.pictures import images
from acsr_ray.benchmark.report import Row
from acsr_ray.benchmark.timing import alternate, timed
from acsr_ray.purification.bands import split_bands
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.options import Precision, PurifyOptions, Reconstruction
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.unrolled import restore_unrolled

PIXELS = 64 * 32 * 32
GPU_PIXELS = 4096 * 32 * 32


def benchmark_unrolled(bundle: str, side: int, *, device: str, repeats: int) -> list[Row]:
    """Return rows of both precisions; the peer is one call in PyTorch's default layout and float32."""
    count = max(2, (GPU_PIXELS if device == "cuda" else PIXELS) // side**2)
    batch = images(count, side).to(device)
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    purifiers: dict[Precision, Purifier] = {}
    for precision in precisions:
        options = PurifyOptions(reconstruction="unrolled", precision=precision)
        purifiers[precision] = Purifier(load_bundle(bundle), device, options)
    low, high = split_bands(batch, purifiers["float32"].config.tikhonov)
    cluster = torch.zeros(count, dtype=torch.int64, device=device)
    network = restore_unrolled(load_bundle(bundle)).to(device)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            network(low, high, cluster)
        seconds = alternate(
            {
                "plain": timed(lambda: network(low, high, cluster), device),
                **{
                    precision: timed(partial(_call, purifier, low, high, cluster), device)
                    for precision, purifier in purifiers.items()
                },
                "encoder": timed(lambda: purifiers["float32"].latents(batch), device),
            },
            repeats,
        )
        exact = _call(purifiers["float32"], low, high, cluster)
        levels = {
            precision: 255 * (_call(purifier, low, high, cluster) - exact).abs().max().item()
            for precision, purifier in purifiers.items()
        }
    rows = [
        Row(
            "unrolled",
            f"network, {precision}",
            side,
            count,
            seconds[precision] / count,
            "one plain call, float32",
            seconds["plain"] / count,
            # The ceiling was measured in float32.
            flop=counter.get_total_flops() / count if precision == "float32" else None,
            note="" if precision == "float32" else f"at most {levels[precision]:.1f} levels from float32",
        )
        for precision in precisions
    ]
    rows.append(Row("unrolled", "encoder", side, count, seconds["encoder"] / count))
    return rows


def benchmark_purifier(bundle: str, side: int, *, device: str, repeats: int) -> list[Row]:
    """Return rows of `Purifier.purify`, all of it: encode, select, split, reconstruct, with either way."""
    batch = images(max(2, (GPU_PIXELS if device == "cuda" else PIXELS) // side**2), side).to(device)
    ways: tuple[Reconstruction, ...] = ("unrolled", "cbpdn")
    purifiers = {
        way: Purifier(load_bundle(bundle), device, PurifyOptions(reconstruction=way)) for way in ways
    }
    with torch.inference_mode():
        seconds = alternate(
            {way: timed(partial(purifier.purify, batch), device) for way, purifier in purifiers.items()},
            repeats,
        )
        clusters = len(purifiers["cbpdn"].select(purifiers["cbpdn"].latents(batch)).index.unique())
    return [
        Row("purifier", f"purify, {way}", side, len(batch), seconds[way] / len(batch), note=note)
        for way, note in (("unrolled", ""), ("cbpdn", f"{clusters} dictionaries"))
    ]


def _call(purifier: Purifier, low: torch.Tensor, high: torch.Tensor, cluster: torch.Tensor) -> torch.Tensor:
    assert purifier.unrolled is not None
    rebuilt: torch.Tensor = purifier.unrolled(low, high, cluster)
    return rebuilt
