"""What an architecture is: one value of data for each, and its key names."""
