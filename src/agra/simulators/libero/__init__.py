"""LIBERO's suites and LIBERO-PRO's perturbations, in a Python environment of their own (`make env-libero`)."""
