"""The code that sees a whole recipe: stages, folders, dry runs, saved runs, sweeps."""
