"""Data sets by name, read and decoded."""
