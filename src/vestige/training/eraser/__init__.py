"""Training the learned eraser: made-up texts with a passage to erase, what the model says without it, and the loss."""
