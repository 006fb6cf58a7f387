"""Captions judged by themselves, without questions."""
