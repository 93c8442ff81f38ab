"""Tables, plots and one HTML page from results folders of benchmark.runner: `python -m benchmark.report RESULTS...`."""
