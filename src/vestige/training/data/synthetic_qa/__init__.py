"""Texts with questions about them: what eviction is trained and validated on."""
