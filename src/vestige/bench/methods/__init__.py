"""What is compared: vestige's policies, other packages' caches and presses."""
