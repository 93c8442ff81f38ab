"""LongBench v1: 21 datasets and its E variant, prompts and scores as THUDM/LongBench's, for every strategy."""
