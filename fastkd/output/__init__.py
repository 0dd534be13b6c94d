"""What is written while a run runs: the screen, the run folder, trackers."""
