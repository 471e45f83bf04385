"""Measurements: what eviction costs and saves."""
