"""Text to packed token rows (`prepare`), and packed rows to batches (`loader`).

A batch is a pure function of (prepared folders, mixture weights, seed, step): documents are tokenized and packed once,
into rows of fixed size that are read by random access, so resuming is a step number and the number of
processes does not matter. Nothing in this package imports JAX itself.
"""
