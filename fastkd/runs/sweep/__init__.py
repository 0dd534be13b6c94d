"""One recipe for many values: the runs of a sweep, side by side, and their table."""
