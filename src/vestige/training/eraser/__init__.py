"""Training of the learned eraser: drafts of texts with passages to erase, samples with target replies, the loss."""
