"""Small trained modules beside a frozen model: retention gates, an indexer, a latent memory, LoRA."""
