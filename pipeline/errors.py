"""What goes wrong when explanations are made. Each text says what was wrong, with the value, and what to do."""


class ModelError(ValueError):
    """A network does not exist or does not fit the data; the text names it and what would fit."""


class RelevanceError(ValueError):
    """The model's operations do not allow a correct heatmap; the text names the operation and the module."""


class ClusterError(ValueError):
    """A Dask cluster cannot be used, or was lost; the text has its address and the remedy."""
