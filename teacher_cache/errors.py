"""What goes wrong with a heatmap store."""


class CacheError(ValueError):
    """There is no heatmap store of ours, it is damaged, or it does not fit. The text has the path and the remedy."""
