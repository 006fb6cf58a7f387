"""Names and schemas of an output, and the plan: which units are committed and which are left to do."""
