"""RULER's 13 tasks (Hsieh et al. 2024, arXiv 2404.06654), made by our own code to the constants in tasks.json."""
