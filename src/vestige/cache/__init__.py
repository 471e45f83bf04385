"""The evicting KV cache and how it sits on transformers."""
