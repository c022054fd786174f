"""The pytest plugin of the mesh."""
