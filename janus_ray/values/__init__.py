"""What a person values: the one type for it, and the one wording that models read."""
