"""What is written about a run, and read again: manifest, provenance, lock, run record."""
