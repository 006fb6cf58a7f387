"""Methods that weigh coverage by how salient a token is."""
