"""The name of `fastkd.storage.weights` in 0.1, kept for one release."""

from fastkd.storage.weights import LoadReport, describe, load_into, load_weights, save_weights

__all__ = ["LoadReport", "describe", "load_into", "load_weights", "save_weights"]
