"""One recipe with many values: the runs of a sweep and their table."""
