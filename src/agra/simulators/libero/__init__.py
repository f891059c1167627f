"""LIBERO's suites and LIBERO-PRO's perturbations of them; in their own environment, made by `make env-libero`."""
