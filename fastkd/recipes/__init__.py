"""The named recipes: one module per paper or data set, and how one is loaded."""
