"""Published runs: each a function that returns its settings, and a command that remakes its numbers."""
