"""Biased datasets: build, store and open them. Knows nothing of models."""

from data.coloured_mnist import make_coloured_mnist
from data.layout import Dataset, DatasetError, DatasetWriter, Split, open_dataset
from data.storage import Location

__all__ = ["Dataset", "DatasetError", "DatasetWriter", "Location", "Split", "make_coloured_mnist", "open_dataset"]
