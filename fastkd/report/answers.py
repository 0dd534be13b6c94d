"""What saved networks answer to the validation images, kept as small files beside a report.

Flow: `fastkd.runs.kept_answers` asks a run's networks and calls `Answers.write`; the figures of
classes and of calibration read them again by `answers_of`.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastkd.printable import in_words
from fastkd.report.runs_read import ReportedRun
from fastkd.storage.atomic import atomic_path

__all__ = ["NETWORKS", "TOP", "Answers", "answers_of"]

NETWORKS = {"student": "student", "alone": "student alone", "teacher": "teacher"}
"""Keys of `ReportedRun.predictions`, and how a figure calls them."""
TOP = 5
"""Classes that are kept of each answer."""


@dataclass(frozen=True)
class Answers:
    """The most probable classes of every labelled validation image, in the order of the data."""

    labels_N: np.ndarray
    """int32 class ids."""
    top_NK: np.ndarray
    """int32 class ids, the most probable one first."""
    probability_NK: np.ndarray
    """float32, of these classes."""
    classes: tuple[str, ...]
    """Names by class id."""

    @property
    def predicted_N(self) -> np.ndarray:
        """int32 class ids."""
        return self.top_NK[:, 0]

    def confusion(self) -> np.ndarray:
        """int64 [C, C]: images by label (rows) and prediction (columns)."""
        count = len(self.classes)
        pairs_N = self.labels_N.astype(np.int64) * count + self.predicted_N
        return np.bincount(pairs_N, minlength=count * count).reshape(count, count)

    def write(self, file: Path) -> None:
        """As npz; RunFailed where the disk refuses."""
        with atomic_path(file) as beside, beside.open("wb") as opened:
            np.savez_compressed(
                opened,
                labels_N=self.labels_N,
                top_NK=self.top_NK,
                probability_NK=self.probability_NK,
                classes=np.array(self.classes, dtype=np.str_),
            )

    @classmethod
    def read(cls, file: Path) -> "Answers":
        """ValueError for a file that `write` has not written."""
        try:
            with np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            classes = tuple(map(str, arrays.pop("classes")))
            answers = cls(**arrays, classes=classes)
            shapes = answers.top_NK.shape, answers.probability_NK.shape
        except Exception as error:  # a zip file fails in many ways
            raise ValueError(in_words(error)) from error
        count = len(answers.labels_N)
        if not (shapes[0] == shapes[1] and len(shapes[0]) == 2 and shapes[0][0] == count):
            raise ValueError(f"arrays of {count} labels and {shapes[0]}, {shapes[1]} answers")
        ids = np.concatenate([answers.labels_N, answers.top_NK.ravel()])
        if count == 0 or ids.min() < 0 or ids.max() >= len(classes):
            raise ValueError(f"class ids that its {len(classes)} classes do not have")
        return answers


def answers_of(run: ReportedRun) -> dict[str, Answers]:
    """By key of NETWORKS; those that were kept and can be read."""
    found: dict[str, Answers] = {}
    for name, file in run.predictions.items():
        try:
            found[name] = Answers.read(file)
        except ValueError as error:
            warnings.warn(f"{file} is damaged ({error}): left out", stacklevel=2)
    return found
