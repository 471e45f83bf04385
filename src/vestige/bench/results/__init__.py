"""Records of a run, how they aggregate, and where they come from."""
