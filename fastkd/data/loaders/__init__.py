"""Batches of a data set: resident on the device, from workers, or from a loader of the user."""
