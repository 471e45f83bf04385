"""Training data: documents, decontamination, synthetic questions and their vocabulary."""
