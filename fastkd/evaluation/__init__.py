"""Exact metrics on the validation images."""
