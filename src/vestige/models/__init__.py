"""What differs between model architectures, and where models come from."""
