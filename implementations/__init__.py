"""Reference implementations: one idea a file, every file runs as a script."""
