"""What may leave this machine: licences of parents, no tokens, no places of a disk."""
