"""Kernels: one package an operation, with a plain-JAX reference and the fast path of each platform."""
