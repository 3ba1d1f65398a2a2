"""Pure Triton helpers that several kernels share. Formulas are cited by their numbers in smattn/reference.py."""
