"""Evaluation: generate, judge, aggregate, report; Ray actors that call endpoints."""
