"""Time `make-data image-folder` beside a plain loop that decodes, scales and stacks the same files in one process.

python benchmarks/image_folder.py --images 4000 --side 128 --rounds 5

The ratio is that of seconds, ours divided by the loop's, in rounds that alternate. Ours also hashes, checks and writes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data import make_image_folder

SIZE = 64


def write_images(folder: Path, images: int, side: int) -> None:
    """Write JPEG photographs: smooth noise, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(images):
        path = folder / f"class{number % 2}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def loop(folder: Path) -> np.ndarray:
    """Decode and scale every image, one after the other."""
    pixels = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            pixels.append(np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
    return np.stack(pixels)


def seconds(function, *arguments, **options) -> float:
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=128, help="of the square images, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images", args.images, args.side)
        make_image_folder(root / "data.zarr", root / "images", {}, size=SIZE)  # imports, and the files into memory
        shutil.rmtree(root / "data.zarr")
        ratios, rates = [], []
        for _ in range(args.rounds):
            plain = seconds(loop, root / "images")
            ours = seconds(make_image_folder, root / "data.zarr", root / "images", {}, size=SIZE)
            shutil.rmtree(root / "data.zarr")
            ratios.append(ours / plain)
            rates.append(args.images / ours)
        print(f"{args.images} images of {args.side}×{args.side}: {statistics.median(rates):.0f} a second")
        print(f"ratio to the loop: {statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]")


if __name__ == "__main__":
    main()
