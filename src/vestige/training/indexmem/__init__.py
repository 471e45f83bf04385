"""Training IndexMem: an indexer that foretells what will be asked for, a memory that restores what was evicted."""
