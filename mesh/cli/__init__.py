"""The command `mesh`: what people start, watch and change a mesh with."""
