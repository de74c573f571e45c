"""Compiled loops over patches of one image, for coordinate descent (see `acsr_ray.sparse.descent`).

Images are (H, (W + w - 1) C), channels last; their first w - 1 columns are repeated at the end, so that every
row of a patch is contiguous although the boundary is circular. Atoms are (M, h w C) in the same order. Both
have sides H >= h and W >= w, and are float32 or float64 in C order; nothing is checked here.

The two inner steps, a patch's product with an atom and its update, are written as vectors of a whole row:
left to the compiler's loop vectoriser they take five times as long (measured, 8 x 8 x 3, AVX-512).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class PatchLoops:
    """The loops for one shape of atoms; all release the interpreter's lock."""

    descend: Callable[..., tuple[float, int]]
    copy_patches: Callable[..., None]
    analyse: Callable[..., None]
    synthesise: Callable[..., None]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile, and keep the machine code if the package's folder or the user's cache can be written."""
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(nogil=True, error_model="numpy")(function)


@lru_cache(maxsize=16)
def patch_loops(height: int, row: int, channels: int) -> PatchLoops:
    """Return the loops for atoms of `height` rows with `row` = w C numbers each."""
    margin = row - channels
    patch_product, patch_update = _vector_steps(height, row)

    def descend(
        residual: Array,
        atoms: Array,
        energy: Array,
        places: Array,
        values: Array,
        lmbda: float,
        sweeps: int,
        enough: float,
    ) -> tuple[float, int]:
        """Sweep over entries until no correlation changes by more than `enough`.

        Returns:
            The largest change of the last sweep, and how many sweeps there were.

        Args:
            residual: of the image; changed in place, as values are.
            atoms: (M, h w C).
            energy: (M,) squared norms.
            places: (n, 3) row, column and atom of the entries.
            values: (n,).
            lmbda: threshold.
            sweeps: most sweeps.
            enough: see above.
        """
        size = residual.shape[0]
        width = residual.shape[1] - margin
        zero = lmbda * 0
        largest = zero
        done = 0
        while done < sweeps:
            done += 1
            largest = zero
            for n in range(len(values)):
                top, left, atom = places[n, 0], places[n, 1] * channels, places[n, 2]
                old, norm = values[n], energy[atom]
                correlation = patch_product(residual, top, left, atoms, atom) + norm * old
                new = zero
                if correlation > lmbda:
                    new = (correlation - lmbda) / norm
                elif correlation < -lmbda:
                    new = (correlation + lmbda) / norm
                change = new - old
                if change == 0:
                    continue
                values[n] = new
                largest = max(largest, abs(change) * norm)
                patch_update(residual, top, left, atoms, atom, -change)
                if left + row > width or left < margin:
                    for p in range(height):
                        i = top + p
                        if i >= size:
                            i -= size
                        for q in range(width, left + row):
                            residual[i, q - width] = residual[i, q]
                        for q in range(left, margin):
                            residual[i, q + width] = residual[i, q]
            if largest <= enough:
                break
        return largest, done

    def copy_patches(image: Array, pixels: Array, out: Array) -> None:
        """Copy the patches that begin at some pixels (numbers i W + j) to out (n, h w C)."""
        size = image.shape[0]
        columns = (image.shape[1] - margin) // channels
        for n in range(len(pixels)):
            i = pixels[n] // columns
            left = (pixels[n] % columns) * channels
            for p in range(height):
                source = image[i, left : left + row]
                target = out[n, p * row : p * row + row]
                for q in range(row):
                    target[q] = source[q]
                i += 1
                if i == size:
                    i = 0

    def analyse(image: Array, atoms: Array, places: Array, out: Array) -> None:
        """Write the product of each entry's atom with its patch to out (n,): D^T of the image."""
        for n in range(len(out)):
            out[n] = patch_product(image, places[n, 0], places[n, 1] * channels, atoms, places[n, 2])

    def synthesise(image: Array, atoms: Array, places: Array, values: Array) -> None:
        """Add D times the entries to an image whose margin is zero; afterwards it repeats the start."""
        width = image.shape[1] - margin
        for n in range(len(values)):
            patch_update(image, places[n, 0], places[n, 1] * channels, atoms, places[n, 2], values[n])
        for i in range(image.shape[0]):
            for q in range(margin):
                image[i, q] += image[i, q + width]
                image[i, q + width] = image[i, q]

    loops = (descend, copy_patches, analyse, synthesise)
    return PatchLoops(*(compiled(loop) for loop in loops))


@compiled
def changed_norm(image: Array, before: Array, height: int, across: int, channels: int, out: Array) -> None:
    """Write the norm of each patch of image - before to out (H, W), and make before a copy of image.

    Args:
        image: (H, (W + w - 1) C).
        before: likewise.
        height: h.
        across: w.
        channels: C.
        out: see above.
    """
    size, columns = out.shape
    squares = np.zeros((size, columns + across - 1), image.dtype)
    along = np.zeros((size, columns), image.dtype)
    for i in range(size):
        for j in range(columns + across - 1):
            for q in range(j * channels, j * channels + channels):
                difference = image[i, q] - before[i, q]
                squares[i, j] += difference * difference
                before[i, q] = image[i, q]
        for w in range(across):
            for j in range(columns):
                along[i, j] += squares[i, j + w]
    for i in range(size):
        out[i] = 0
        for p in range(height):
            k = i + p
            if k >= size:
                k -= size
            for j in range(columns):
                out[i, j] += along[k, j]
        for j in range(columns):
            out[i, j] = np.sqrt(out[i, j])


@compiled
def blank_entries(correlation: Array, position: Array, places: Array, values: Array, width: int) -> None:
    """Blank correlations (n, M) of entries that are not 0; position (H W,) is a pixel's row there, or -1."""
    for k in range(len(places)):
        n = position[places[k, 0] * width + places[k, 1]]
        if n >= 0 and values[k] != 0:
            correlation[n, places[k, 2]] = 0


@compiled
def strongest(magnitude: Array, largest: Array, pixels: Array, least: float, width: int, found: Array) -> int:
    """Write (row, column, atom) of every pixel's entry above `least` to found (n, 3); return how many.

    Args:
        magnitude: (n, M) of the correlations.
        largest: (n,) the largest of each row.
        pixels: (n,) their numbers.
        least: see above.
        width: W.
        found: see above.
    """
    count = 0
    for n in range(len(pixels)):
        if largest[n] > least:
            for m in range(magnitude.shape[1]):
                if magnitude[n, m] == largest[n]:
                    found[count, 0] = pixels[n] // width
                    found[count, 1] = pixels[n] % width
                    found[count, 2] = m
                    count += 1
                    break
    return count


@compiled
def merge(places: Array, values: Array, found: Array, all_places: Array, all_values: Array) -> int:
    """Merge entries that are not zero with new ones of value 0, by pixel; return how many there are.

    Args:
        places: (n, 3) row, column and atom of the entries, sorted by pixel.
        values: (n,).
        found: (k, 3) new ones, likewise.
        all_places: (n + k, 3), written.
        all_values: (n + k,), written.
    """
    count, n = 0, 0
    for k in range(len(found) + 1):
        while n < len(values) and (
            k == len(found)
            or places[n, 0] < found[k, 0]
            or (places[n, 0] == found[k, 0] and places[n, 1] <= found[k, 1])
        ):
            if values[n] != 0:
                all_places[count] = places[n]
                all_values[count] = values[n]
                count += 1
            n += 1
        if k < len(found):
            all_places[count] = found[k]
            all_values[count] = 0
            count += 1
    return count


def _vector_steps(height: int, row: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return patch_product(image, top, left, atoms, atom) and patch_update of the same and a scale."""

    @intrinsic
    def patch_product(typing, image, top, left, atoms, atom):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        signature = image.dtype(image, types.intp, types.intp, atoms, types.intp)

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:  # noqa: ANN401
            number = context.get_data_type(signature.return_type)
            sums: list[Any] = [None, None]
            for p, (pixels, taps) in enumerate(_rows(context, builder, signature, args, height, row)):
                product = builder.fmul(
                    _load(builder, pixels, number), _load(builder, taps, number), flags=("contract",)
                )
                # Two sums, since each addition waits for the one before it.
                before = sums[p % 2]
                sums[p % 2] = (
                    product if before is None else builder.fadd(before, product, flags=("contract",))
                )
            total = sums[0] if sums[1] is None else builder.fadd(*sums)
            bits = signature.return_type.bitwidth
            reduce = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(number, [number, total.type]),
                f"llvm.vector.reduce.fadd.v{row}f{bits}",
            )
            return builder.call(reduce, [ir.Constant(number, -0.0), total], fastmath=("reassoc",))

        return signature, generate

    @intrinsic
    def patch_update(typing, image, top, left, atoms, atom, scale):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        signature = types.void(image, types.intp, types.intp, atoms, types.intp, image.dtype)

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:  # noqa: ANN401
            number = args[5].type
            undefined = ir.Constant(ir.VectorType(number, row), ir.Undefined)
            first = ir.Constant(ir.IntType(32), 0)
            scale = builder.insert_element(undefined, args[5], first)
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), row), [0] * row)
            scale = builder.shuffle_vector(scale, undefined, everywhere)
            for pixels, taps in _rows(context, builder, signature, args, height, row):
                added = builder.fmul(_load(builder, taps, number), scale, flags=("contract",))
                store = builder.store(
                    builder.fadd(_load(builder, pixels, number), added, flags=("contract",)), pixels
                )
                store.align = _bytes(number)
            return context.get_dummy_value()

        return signature, generate

    # By name, not by a number drawn anew in each process, or machine code on disk would never be found again.
    patch_product._set_uuid(f"acsr-patch-product-{height}-{row}")
    patch_update._set_uuid(f"acsr-patch-update-{height}-{row}")
    return patch_product, patch_update


def _rows(
    context: Any,  # noqa: ANN401
    builder: Any,  # noqa: ANN401
    signature: Any,  # noqa: ANN401
    args: Sequence[Any],
    height: int,
    row: int,
) -> list[tuple[Any, Any]]:
    """Return pointers to each row of the patch, wrapped at the last row of the image, and of the atom."""
    image, top, left, atoms, atom = args[:5]
    image_type, _, _, atoms_type, _ = signature.args[:5]
    pixels = context.make_array(image_type)(context, builder, image)
    taps = context.make_array(atoms_type)(context, builder, atoms)
    size, stride = cgutils.unpack_tuple(builder, pixels.shape)
    vector = ir.VectorType(context.get_data_type(image_type.dtype), row).as_pointer()
    start = builder.mul(atom, ir.Constant(atom.type, height * row))
    pointers = []
    for p in range(height):
        i = builder.add(top, ir.Constant(top.type, p))
        i = builder.select(builder.icmp_signed(">=", i, size), builder.sub(i, size), i)
        offset = builder.add(builder.mul(i, stride), left)
        tap = builder.add(start, ir.Constant(start.type, p * row))
        pointers.append(
            (
                builder.bitcast(builder.gep(pixels.data, [offset]), vector),
                builder.bitcast(builder.gep(taps.data, [tap]), vector),
            )
        )
    return pointers


def _load(builder: Any, pointer: Any, number: Any) -> Any:  # noqa: ANN401
    value = builder.load(pointer)
    value.align = _bytes(number)
    return value


def _bytes(number: Any) -> int:  # noqa: ANN401
    return 8 if isinstance(number, ir.DoubleType) else 4
