"""Benchmarks: `python -m bench` runs the suites bench_*.py, `python -m bench --render` writes their tables."""
