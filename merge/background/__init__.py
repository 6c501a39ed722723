"""Threads and processes beside the main one: hashing, workers, isolated children."""
