"""What goes wrong with a training."""


class TrainingError(ValueError):
    """A training cannot start, or must stop. The text says why, and what to change."""
