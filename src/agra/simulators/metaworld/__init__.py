"""Meta-World's 50 tasks; in its own environment, made by `make env-metaworld`."""
