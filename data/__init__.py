"""Biased datasets: build, store and open them. Knows nothing of models."""

from data.builders.coco_on_places import make_coco_on_places
from data.builders.coloured_mnist import make_coloured_mnist
from data.builders.fashion_on_textures import make_fashion_on_textures
from data.builders.image_folder import make_image_folder
from data.builders.waterbirds import make_waterbirds
from data.layout import Dataset, DatasetError, DatasetWriter, Split, open_dataset
from data.storage import Location

__all__ = [
    "Dataset",
    "DatasetError",
    "DatasetWriter",
    "Location",
    "Split",
    "make_coco_on_places",
    "make_coloured_mnist",
    "make_fashion_on_textures",
    "make_image_folder",
    "make_waterbirds",
    "open_dataset",
]
