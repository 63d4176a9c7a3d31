"""The batches of a training, in an order that the seed alone decides."""
