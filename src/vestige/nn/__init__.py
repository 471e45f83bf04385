"""Small trained modules for a frozen model: retention gates, an indexer, a latent memory, LoRA."""
