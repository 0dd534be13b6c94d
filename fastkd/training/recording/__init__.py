"""What a training keeps for figures: `report.record`, at no change of a single bit of the training.

Flow: `training.build` makes a `Recorder`; the trainer shows it the last steps of every epoch and
lets it write when the epoch ends; `fastkd.report.figures` draws.

    weights      weights.py     histogram and percentiles of three layers, and before the training
    kl           divergence.py  KL of teacher and student on what the epoch's last steps were shown
    samples      samples.py     images that the networks see, and their top 5, in the last epoch
    alignment    alignment.py   distance of the stages of student and teacher
    time         step_clock.py  where the time of the epoch's last steps went
"""

from fastkd.training.recording.recorder import Recorded, Recorder, build_recorder
from fastkd.training.recording.step_clock import StepClock

__all__ = ["Recorded", "Recorder", "StepClock", "build_recorder"]
