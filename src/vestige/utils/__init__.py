"""Small helpers that know nothing of caches: files, options in names, registries, timing."""
