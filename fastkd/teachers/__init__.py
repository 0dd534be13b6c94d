"""Frozen networks that are imitated: one or several, loaded, proven, asked for their taps."""
