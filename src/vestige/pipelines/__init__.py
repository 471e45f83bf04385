"""Whole tasks on a cache: answer questions about a document, erase a passage, hold a conversation."""
