"""Files that survive a crash: atomic writing, checkpoints, our weights and foreign ones."""
