"""Every strategy on recorded attention states: output error, recall and mass against what is read and scored.

`python -m benchmark.index.extract` records traces, `python -m benchmark.index` measures strategies on them,
`python -m benchmark.index.plot` draws the results.
"""
