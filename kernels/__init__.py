"""The Triton kernels of smattn. `backend.py` is the one door in; every other file here is behind it."""
