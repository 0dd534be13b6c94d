"""What knows a whole recipe: stages, folders, dry runs, saved runs, sweeps."""
