"""Benchmarks of accuracy, bytes and time: of eviction, memories, peers and erasers."""
