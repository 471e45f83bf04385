"""The methods that benchmarks compare: vestige's policies, and other packages' caches and presses."""
