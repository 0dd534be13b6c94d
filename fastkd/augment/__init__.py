"""Views of a batch: x, the second view x', and the choice among several x'."""
