"""The members behind the contract in `mesh.journal`: one engine of durable delivery a module."""
