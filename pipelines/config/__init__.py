"""The keys of every job, and how defaults, YAML and arguments become one checked configuration."""
