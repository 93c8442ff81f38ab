"""Eviction: which tokens of a prompt are kept under a budget, and the scores that say so."""
