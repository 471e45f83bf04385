"""The benchmark of erasers: does a cache from which a passage was taken answer as if it had never been read?

A sample (``sample``) is a context with marked passages and several questions; ``tasks`` lists the ways of making one;
``items`` turns it into token ids, once. ``run`` puts every sample through every eraser, on forks of one reading, and
``rows`` is what the records come to. ``latency`` times the edit alone.
"""
