"""Training of retention gates: soft attention, soft eviction, the capacity loss and the warm start."""
