"""Names, schemas and the plan of an output: what is committed, and what is left to do."""
