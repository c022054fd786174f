"""The members of `mesh.broker.MessageBroker`: one fabric a file."""
