"""Files that survive a crash: atomic writing, checkpoints, weights of ours and of others."""
