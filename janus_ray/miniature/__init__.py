"""A world small enough for two CPU cores, in which every stage runs for real."""
