"""What the pages of a grid and of a choice have in common: cells, charts, embedded pictures."""
