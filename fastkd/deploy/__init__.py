"""Trained networks leave fastkd: files for other programs, and how long they take elsewhere."""
