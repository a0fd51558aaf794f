"""Benchmarks: what is asked, what of, and how an answer becomes a score. Pure; the steps around them do the asking."""
