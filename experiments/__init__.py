"""Published experiments: each has functions that return its settings, and a command that remakes its results."""
