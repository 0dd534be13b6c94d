"""The `fastkd` command: its words, and what each command does."""
