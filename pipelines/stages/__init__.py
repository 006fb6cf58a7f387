"""The stages a work unit passes: read, encode and select, write; and the unit itself."""
