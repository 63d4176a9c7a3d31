"""Builders of biased datasets, one module each. Each writes the layout of `data.layout`."""
