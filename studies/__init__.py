"""Studies and benchmarks, each `python -m studies.NAME`."""
