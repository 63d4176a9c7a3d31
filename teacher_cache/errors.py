"""What goes wrong with a heatmap store."""


class CacheError(ValueError):
    """Not a heatmap store of ours, or not one that fits; the text has the path and the remedy."""
