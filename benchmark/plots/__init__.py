"""Drawings of single prompts, for looking at where a method fails."""
