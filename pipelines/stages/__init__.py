"""The stages that a unit passes: read, encode (which prunes) and write; and the batch of a unit that they pass on."""
