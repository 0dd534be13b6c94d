"""Cheap substitutes for a 3x3 convolution: their names, and their layers."""
