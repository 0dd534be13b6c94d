"""What a run is: the typed schema of its keys, and how they are written and printed."""
