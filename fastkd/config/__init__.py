"""The ground under recipe and losses: typed sections, and mistakes in them as sentences."""
