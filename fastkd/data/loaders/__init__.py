"""Batches of a data set: resident on the device, from workers, or from the user's own loader."""
