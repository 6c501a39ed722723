"""Workers that keep what they loaded, for a long row of jobs: here or on a Ray cluster."""
