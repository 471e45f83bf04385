"""Models: the differences between architectures, and loading."""
