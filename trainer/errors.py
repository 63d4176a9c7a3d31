"""What a user is told when a training cannot be had as asked for."""


class TrainingError(ValueError):
    """A training that cannot start, or must stop; the text says why and what to change."""
