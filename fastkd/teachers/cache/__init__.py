"""What a frozen teacher answered, kept on disk view by view, and read in place of asking it."""
