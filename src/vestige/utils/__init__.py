"""Small helpers that do not depend on caches: files, options in names, registries, timing."""
