"""Frozen networks that are imitated: one or several, loaded, checked, asked for their taps."""
