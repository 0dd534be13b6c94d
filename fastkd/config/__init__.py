"""The base of recipe and losses: typed sections, and readable messages for mistakes in them."""
