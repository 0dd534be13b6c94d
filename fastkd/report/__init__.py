"""What a run leaves behind and what it shows: run folder, console, curves."""
