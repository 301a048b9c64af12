"""Mixture of experts: router, dispatch and the sparse layer."""
