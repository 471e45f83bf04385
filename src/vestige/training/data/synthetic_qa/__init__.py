"""Synthetic texts with questions: training and validation data of retention gates and IndexMem."""
