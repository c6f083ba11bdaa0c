"""One family of generators, one file; and the two ways between a checkpoint and an artifact."""
