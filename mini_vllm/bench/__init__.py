"""Measuring the engine: request sets, one timed run, what it cost in bytes and operations, and what the machine allows.

`latency.py` and `throughput.py` are the two benchmarks behind `mini-vllm bench`; everything else here is a part of
both. docs/benchmarking.md defines each figure.
"""
