from .builders.coco_on_places import make_coco_on_places
from .builders.coloured_mnist import make_coloured_mnist
from .builders.fashion_on_textures import make_fashion_on_textures
from .builders.flipped import make_flipped
from .builders.hf import make_hf
from .builders.image_folder import make_image_folder
from .builders.masked import make_masked
from .builders.solar_cells import make_solar_cells
from .builders.spuco_mnist import make_spuco_mnist
from .builders.torch_datasets import from_arrays, from_torch
from .builders.waterbirds import make_waterbirds
from .builders.webdataset import make_webdataset
from .errors import DatasetError
from .layout import Dataset, DatasetWriter, Split, add_fingerprints, open_dataset
from .storage import Location

__all__ = [
    "Dataset",
    "DatasetError",
    "DatasetWriter",
    "Location",
    "Split",
    "add_fingerprints",
    "from_arrays",
    "from_torch",
    "make_coco_on_places",
    "make_coloured_mnist",
    "make_fashion_on_textures",
    "make_flipped",
    "make_hf",
    "make_image_folder",
    "make_masked",
    "make_solar_cells",
    "make_spuco_mnist",
    "make_waterbirds",
    "make_webdataset",
    "open_dataset",
]
