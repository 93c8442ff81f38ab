"""Training of the default model's 64K adapter on synthetic long-context questions in RULER's formats."""
