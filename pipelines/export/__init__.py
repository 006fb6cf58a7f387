"""Exports: committed captions written where trainers read them, each file once and whole."""
