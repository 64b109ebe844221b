"""What Numba compiles: arrays, ints and a scratch buffer go in, and nothing is allocated."""
