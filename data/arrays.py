"""Take the arrays of a split as people have them: check shapes and dtypes, convert where no value is lost, or refuse.

Arrays are looked at only, and read by others. This module knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import DatasetError

FEW_CHANNELS = (1, 2, 3, 4)  # grey, grey with alpha, RGB, RGB with alpha
LARGE = 8  # pixels: no image of so many channels and with so few columns is likely
LONG = 8  # times the width: (N, 12, 1000, 1) are rather signals of 12 channels than images of 12 × 1000 pixels
CONVERTED = {"images": "iu", "labels": "b", "groups": "b", "masks": "biu"}  # kinds of dtypes without a loss
AXES = {
    1: ("c", "channel", "channels", "band", "bands", "rgb"),
    2: ("y", "h", "height", "row", "rows", "lat", "latitude"),
    3: ("x", "w", "width", "col", "cols", "column", "columns", "lon", "longitude"),
}  # names that people give to the axes of images (N, C, H, W)
IN_ORDER = [0, 1, 2, 3]
NAMED_AXES = 'zarr.create_array({}, data=images, dimension_names=("sample", "channel", "row", "column"))'
SAMPLED = 64  # rows that are read to describe values that are refused


@dataclass(frozen=True)
class Converted:
    """Rows of an array that are converted to another integer dtype when they are read.

    Attributes:
        name: Name of the array, for errors.
        values: The array, of integers or booleans.
        dtype: The dtype to convert to.
        dims: Names of the axes; None without.
    """

    name: str
    values: Any
    dtype: np.dtype
    dims: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.values.shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read and convert rows.

        Raises:
            DatasetError: A value does not fit the dtype.
        """
        piece, limits = np.asarray(self.values[rows]), np.iinfo(self.dtype)
        if piece.size and piece.dtype.kind != "b":
            low, high = piece.min(), piece.max()
            if low < limits.min or high > limits.max:
                remedy = "(masks != 0)" if self.name == "masks" else "scale them to 0 to 255 first"
                raise DatasetError(
                    f"'{self.name}' is {piece.dtype} with values from {low} to {high}, which {self.dtype} does not "
                    f"hold: {remedy}"
                )
        return piece.astype(self.dtype)


def as_arrays(where: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Take arrays, PyTorch tensors, lists and pandas columns, and convert dtypes where no value is lost.

    Args:
        where: The split, for errors.
        arrays: The arrays by name. One with a shape, a NumPy dtype and slices of rows is taken as it is, unread.

    Returns:
        The arrays by name, each with a shape, a NumPy dtype and slices of rows. Integers and booleans are converted
        when they are read: images and masks to uint8, booleans of labels and groups to int64.

    Raises:
        DatasetError: A value is no array, or the arrays are not those of a split (`check_arrays`).
    """
    taken = {name: _as_array(where, name, values) for name, values in arrays.items()}
    for name, values in taken.items():
        dtype = np.dtype(np.uint8 if name in ("images", "masks") else np.int64)
        own = np.dtype(values.dtype)
        if own.kind in CONVERTED[name] and own != dtype:
            taken[name] = Converted(name, values, dtype, names_of_axes(values))
    check_arrays(where, taken)
    return taken


def _as_array(where: str, name: str, values: Any) -> Any:
    """Find or make an object with a shape, a NumPy dtype and slices of rows."""
    try:
        if isinstance(values, list | tuple):
            return np.asarray([_in_memory(row) for row in values] if _holds_tensors(values) else values)
        values = _in_memory(values)
        if _numpy_dtype(values) is None and hasattr(values, "__array__"):  # such as a tensor of TensorFlow
            values = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of several sizes; a dtype that NumPy lacks
        raise DatasetError(f"{where}: '{name}' cannot be made a NumPy array ({error}): give one") from None
    if _numpy_dtype(values) is not None and hasattr(values, "shape") and hasattr(values, "__getitem__"):
        return values
    raise DatasetError(
        f"{where}: '{name}' is a {type(values).__name__}, which has no shape, dtype and slices of rows: give an array, "
        "a tensor or a list, such as [image for image, label in dataset] of a PyTorch Dataset"
    )


def _in_memory(values: Any) -> Any:
    """Convert a PyTorch tensor on any device, or a column of pandas, without importing either."""
    if hasattr(values, "detach") and hasattr(values, "cpu"):
        return values.detach().cpu().numpy()
    return values.to_numpy() if hasattr(values, "iloc") else values  # pandas slices rows by their labels


def _holds_tensors(values: Any) -> bool:
    return any(hasattr(row, "detach") for row in values[:1])


def _numpy_dtype(values: Any) -> np.dtype | None:
    """Get the dtype of an array; None if it has none that NumPy knows."""
    try:
        return None if getattr(values, "dtype", None) is None else np.dtype(values.dtype)
    except TypeError:
        return None


def check_arrays(where: str, arrays: Mapping[str, Any]) -> None:
    """Check that a split's arrays have the layout's types and fit together. None is read.

    Args:
        where: The split, for errors.
        arrays: The arrays by name, each with a shape and a dtype.

    Raises:
        DatasetError: They do not. The text has the array's name, dtype and shape, and the remedy.
    """
    for required in ("images", "labels"):
        if required not in arrays:
            raise DatasetError(
                f"{where} has no array '{required}': add it, or move the group out of the dataset "
                "(docs/dataset-layout.md)"
            )
    images = arrays["images"]
    shape = tuple(images.shape)
    expected = {"images": "uint8 (N, C, H, W)"}
    remedies = {"images": _images_remedy(images, tuple(arrays["labels"].shape)[:1])}
    if remedies["images"] is None:
        samples, _, height, width = shape
        masks = (samples, 1, height, width)
        expected |= {"labels": f"integers ({samples},)", "groups": f"integers ({samples},)", "masks": f"uint8 {masks}"}
        remedies |= {name: _ids_remedy(name, arrays[name], samples) for name in ("labels", "groups") if name in arrays}
        if "masks" in arrays:
            remedies["masks"] = _masks_remedy(arrays["masks"], masks)
    for name, remedy in remedies.items():
        if remedy is not None:
            actual = f"{arrays[name].dtype} {tuple(arrays[name].shape)}"
            raise DatasetError(f"{where}: '{name}' is {actual}, expected {expected[name]}: {remedy}")


def doubtful_axes(images: Any) -> bool:
    """Check whether images (N, C, H, W) are so narrow, with so many channels, that the axes may be (N, H, W, C).

    Args:
        images: An array. Names of its axes, if it has any in this order, tell that they are not.
    """
    return _is_narrow(tuple(images.shape)) and _places(images) != IN_ORDER


def telling_names(images: Any) -> tuple[str, ...] | None:
    """Return the names of the axes of images whose axes would be doubtful without them; None for others."""
    is_told = _is_narrow(tuple(images.shape)) and _places(images) == IN_ORDER
    return names_of_axes(images) if is_told else None


def _is_narrow(shape: tuple[int, ...]) -> bool:
    return shape[3] in FEW_CHANNELS and shape[1] not in FEW_CHANNELS


def names_of_axes(array: Any) -> tuple[str, ...] | None:
    """Return the names of the four axes of an array of Zarr or xarray; None for others, which have no names."""
    names = getattr(getattr(array, "metadata", None), "dimension_names", None) or getattr(array, "dims", None)
    names = names or getattr(array, "attrs", {}).get("_ARRAY_DIMENSIONS")
    if not isinstance(names, list | tuple) or len(names) != 4:
        return None
    return tuple(map(str, names))


def _places(array: Any) -> list[int] | None:
    """Return the place of each axis in (N, C, H, W) by its name; None if the axes have no names, or others."""
    names = names_of_axes(array) or ()
    places = [next((axis for axis, words in AXES.items() if name.lower() in words), 0) for name in names]
    return places if sorted(places) == IN_ORDER else None


def axes_by_name(array: Any) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """Compare the names of the axes of images or masks with (N, C, H, W).

    Args:
        array: An array of Zarr or xarray. Others have no names.

    Returns:
        The names, and the transposition that puts the axes in order; None if they are in order, or have other names.
    """
    names, places = names_of_axes(array), _places(array)
    if names is None or places is None or places == IN_ORDER:
        return None
    return names, tuple(places.index(axis) for axis in range(4))


def _images_remedy(images: Any, labels: tuple[int, ...]) -> str | None:
    """Tell how to mend images that do not fit the layout; None if they do."""
    shape = tuple(images.shape)
    if shape[:1] == (0,):
        return "the split has no samples: leave it out, or add some"
    if len(shape) == 3:
        return "add the axis of the channels: images[:, None] of grey images"
    if len(shape) != 4:
        return "give them four axes: images.reshape(N, C, H, W)"
    if 0 in shape:
        return "the images have no pixels: make them again"
    if labels == shape[3:] and labels != shape[:1]:
        axes = (3, 2, 0, 1) if shape[2] in FEW_CHANNELS else (3, 0, 1, 2)
        return f"the samples are the last axis, so transpose them: images.transpose{axes}"
    short, long = sorted(shape[1:3])
    if doubtful_axes(images) and short >= LARGE and long <= LONG * short:
        return (
            "the channels are the last axis, so transpose them: images.transpose(0, 3, 1, 2); or, if these are "
            f"{shape[1]} channels of {shape[2]}×{shape[3]} pixels, name the axes: {NAMED_AXES}"
        )
    if np.dtype(images.dtype) == np.uint8:
        return None
    kind = np.dtype(images.dtype).kind
    if kind == "f":
        return _floats_remedy(images)
    if kind == "b":
        return "convert them: images.astype(np.uint8) * 255"
    return "convert them to values from 0 to 255: images.astype(np.uint8)"


def _floats_remedy(images: Any) -> str:
    """Tell how to convert floats to uint8, by the first values if they are in memory."""
    rounded = "images.round().astype(np.uint8)"
    unit = "(images * 255).round().astype(np.uint8)"
    if not isinstance(images, np.ndarray) or not np.isfinite(images[:SAMPLED]).all():
        return f"convert them: {unit} if they run from 0 to 1, {rounded} if they run from 0 to 255"
    low, high = float(images[:SAMPLED].min()), float(images[:SAMPLED].max())
    values = f"the first values run from {low:.4g} to {high:.4g}"
    if low < 0 or high > 255:
        return f"{values}, so undo their normalisation, and convert them to uint8 from 0 to 255"
    return f"{values}: {unit if high <= 1 else rounded}"


def _ids_remedy(name: str, values: Any, samples: int) -> str | None:
    """Tell how to mend labels or groups that do not fit the layout; None if they do."""
    shape, kind = tuple(values.shape), np.dtype(values.dtype).kind
    if shape == (samples, 1):
        return f"remove the second axis: {name}[:, 0]"
    if len(shape) == 2 and shape[0] == samples:
        return f"convert one-hot vectors, or scores, to numbers: {name}.argmax(1)"
    if shape != (samples,):
        return f"there are {samples} images: give one number for each"
    if kind in "iu":
        return None
    if kind == "f":
        return f"convert them if all are whole numbers: {name}.astype(np.int64)"
    if kind == "b":
        return f"convert them: {name}.astype(np.int64)"
    return f"number them: names, {name} = np.unique({name}, return_inverse=True)"


def _masks_remedy(masks: Any, expected: tuple[int, ...]) -> str | None:
    """Tell how to mend masks that do not fit the layout; None if they do."""
    shape = tuple(masks.shape)
    samples, _, height, width = expected
    if shape == expected:
        if np.dtype(masks.dtype) == np.uint8:
            return None
        if np.dtype(masks.dtype).kind in "biu":
            return "convert them: (masks != 0).astype(np.uint8)"
        return "convert them: (masks > 0.5).astype(np.uint8) if they run from 0 to 1"
    if shape == (samples, height, width):
        return "add the axis of the channel: masks[:, None]"
    if shape == (samples, height, width, 1):
        return "the channel is the last axis, so transpose them: masks.transpose(0, 3, 1, 2)"
    if len(shape) == 4 and (shape[0], *shape[2:]) == (samples, height, width):
        return "make one channel of them: masks.max(1, keepdims=True)"
    return "give one mask for each image, of its height and width"
