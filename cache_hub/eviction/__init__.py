"""Eviction: what of a prompt is kept under a budget."""
