"""Decide what happens to every tensor, from headers alone, before any weight is read."""
