"""Training retention gates: attention that forgets softly, what that would keep, texts with questions, the loss."""
