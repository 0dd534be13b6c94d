"""The documented name of `fastkd.storage.weights` before 0.2; the same functions."""

from fastkd.storage.weights import load_into, load_weights, save_weights

__all__ = ["load_into", "load_weights", "save_weights"]
