"""What goes wrong with a dataset."""


class DatasetError(ValueError):
    """There is no dataset in our layout, it is damaged, or it does not fit. The text has the path and the remedy."""
