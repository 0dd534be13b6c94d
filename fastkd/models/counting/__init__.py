"""Parameters, multiply-accumulates and memory of a network."""
