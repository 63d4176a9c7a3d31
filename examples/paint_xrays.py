"""Paint pictures like chest X-rays of seven hospitals, in folders by source and class, with masks of the lungs.

Nothing here is medicine: the pictures let you try docs/own-images.md#several-sources without patients' data.

    python examples/paint_xrays.py --out xrays

Training and ``iid`` have COVID-19 from two hospitals, healthy lungs and pneumonia from two others. ``ood`` has all
three classes from three more hospitals. Each hospital has a marker of its own at the edge, and its own exposure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32
TRAINING = {  # images of each class in each hospital
    "a": {"covid": 200},
    "b": {"covid": 200},
    "c": {"normal": 200, "pneumonia": 200},
    "d": {"normal": 200, "pneumonia": 200},
}
IID = {hospital: {name: images // 4 for name, images in classes.items()} for hospital, classes in TRAINING.items()}
UNSEEN = {
    "e": {"covid": 20, "normal": 40, "pneumonia": 20},
    "f": {"covid": 60, "normal": 180, "pneumonia": 60},
    "g": {"covid": 20, "normal": 60, "pneumonia": 40},
}
SPLITS = {"train": TRAINING, "iid": IID, "ood": UNSEEN}
EXPOSURE = {"a": 0.95, "b": 0.85, "c": 1.05, "d": 1.1, "e": 0.85, "f": 1.1, "g": 1.0}
LEFT = "abe"  # hospitals whose marker is on the left

Y, X = np.mgrid[:SIZE, :SIZE]


def ellipse(y: float, x: float, height: float, width: float) -> np.ndarray:
    """Return whether a pixel is inside, bool (32, 32)."""
    return ((Y - y) / height) ** 2 + ((X - x) / width) ** 2 <= 1


def paint(name: str, hospital: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return a grey picture of a chest and the mask of its lungs."""
    top, height = rng.uniform(16, 18), rng.uniform(9, 11)
    lungs = [ellipse(top, side + rng.uniform(-1, 1), height, rng.uniform(4.5, 5.5)) for side in (9.5, 22.5)]
    chest = np.where(ellipse(20, 16, 20, 16), 0.6, 0.1)
    chest[lungs[0] | lungs[1]] = 0.25
    rng.shuffle(lungs)
    for lung in lungs[: {"normal": 0, "pneumonia": 1, "covid": 2}[name]]:
        middle = np.argwhere(lung & (Y > 17))[rng.integers((lung & (Y > 17)).sum())]
        radius = rng.uniform(2, 3) if name == "covid" else rng.uniform(4, 5)
        chest[lung & ellipse(*middle, radius, radius)] = 0.45
    column = 3 if hospital in LEFT else SIZE - 6
    letter = np.random.default_rng(ord(hospital)).random((4, 3)) < 0.7
    chest[2:6, column : column + 3][letter] = 0.95
    chest = EXPOSURE[hospital] * chest + rng.normal(0, 0.04, chest.shape)
    pixels = (255 * chest.clip(0, 1)).astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray(lungs[0] | lungs[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Folder to write.")
    out = parser.parse_args().out
    rng = np.random.default_rng(0)
    for split, hospitals in SPLITS.items():
        for hospital, classes in hospitals.items():
            for name, images in classes.items():
                place = Path(split, f"hospital-{hospital}", name)
                (out / place).mkdir(parents=True, exist_ok=True)
                (out / "masks" / place).mkdir(parents=True, exist_ok=True)
                for number in range(images):
                    picture, lungs = paint(name, hospital, rng)
                    picture.save(out / place / f"{number:04}.png")
                    lungs.save(out / "masks" / place / f"{number:04}.png")


if __name__ == "__main__":
    main()
