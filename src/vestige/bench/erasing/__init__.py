"""The benchmark of erasers: does a cache whose passage was erased answer as if it had never read the passage?

A sample (``sample``) is a context with marked passages and several questions. ``tasks`` lists the tasks that make
samples, ``items`` turns samples into token ids, ``runner`` runs every sample through every eraser on forks of one
reading, and ``aggregate`` makes rows of the records. ``latency`` times the edit alone.
"""
