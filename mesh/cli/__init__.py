"""The command `mesh`: one file a group of commands; click parses, rich draws."""
