"""Training of IndexMem: an indexer that predicts attention, and memories that restore evicted pairs."""
