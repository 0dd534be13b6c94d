"""`fastkd predict`."""

import argparse

from fastkd.runs.predict import predict as predict_images

__all__ = ["predict"]


def predict(options: argparse.Namespace) -> None:
    """Label maps, or classes with probabilities, of any pictures."""
    print(predict_images(options.run, options.words, options.out))
