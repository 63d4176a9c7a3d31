"""Read IDX files, the format of MNIST and Fashion-MNIST, and the embedded MNIST files."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from data.errors import DatasetError

MNIST_DIR = Path(__file__).parent.parent / "mnist"
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "71524e2cd1ad2968737f7f2f2ff69cbfc32df8ccddff51593f7cb2d4e0eb5b64",
    "train-labels-idx1-ubyte.gz": "fe03b8bd7915f70bf5aa08be480aa413fbd85afcaa58b35d230d335f284fd88e",
    "t10k-images-idx3-ubyte.gz": "5634745efa576a17e7d4cf5cd9d09123c75e6538e5114267c2d156edaf519341",
    "t10k-labels-idx1-ubyte.gz": "ae18e77e031ccde52407f794d123116439864147d33ac992975f85dd4dc42af6",
}


def read_mnist(part: str, directory: Path = MNIST_DIR) -> tuple[np.ndarray, np.ndarray]:
    """Read the embedded MNIST.

    Args:
        part: ``train`` (60,000 samples) or ``t10k`` (10,000).
        directory: the folder of the files.

    Returns:
        The images (N, 28, 28) and labels (N,), both uint8.

    Raises:
        DatasetError: A file is missing or is not the original, by its SHA-256.
    """
    return (
        _read(directory / f"{part}-images-idx3-ubyte.gz"),
        _read(directory / f"{part}-labels-idx1-ubyte.gz"),
    )


def _read(path: Path) -> np.ndarray:
    try:
        compressed = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"the MNIST file {path} is missing: restore it from the repository") from None
    digest = hashlib.sha256(compressed).hexdigest()
    if digest != MNIST_SHA256[path.name]:
        raise DatasetError(
            f"the MNIST file {path} is not the original: its SHA-256 is {digest}, expected "
            f"{MNIST_SHA256[path.name]}; restore it from the repository"
        )
    return read_idx(path)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, compressed by gzip or not.

    Returns:
        The array, uint8.

    Raises:
        DatasetError: The file is cut off, damaged or of another kind.
        OSError: The file cannot be read.
    """
    raw = path.read_bytes()
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        # two zero bytes, the type (8 = uint8), the number of axes, each axis as a big-endian int32, the values
        if raw[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as an IDX file of bytes does")
        axes = raw[3]
        shape = np.frombuffer(raw, ">i4", count=axes, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise DatasetError(f"the IDX file {path} cannot be read ({error}): download it again") from None
