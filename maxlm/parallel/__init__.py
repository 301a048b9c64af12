"""Device meshes and the mapping from logical dims to mesh axes."""
