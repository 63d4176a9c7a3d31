"""What goes wrong with a dataset."""


class DatasetError(ValueError):
    """Not a dataset in our layout, or not one that fits; the text has the path and the remedy."""
