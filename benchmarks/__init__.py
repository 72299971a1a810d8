"""Benchmarks: both sides in one run, on an embedded server with durable commits; `python -m benchmarks --help`."""
