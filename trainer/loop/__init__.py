"""One training step after another: methods, losses, optimizers, augmentation, processes."""
