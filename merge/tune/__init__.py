"""The choice of a recipe's weight by measurement."""
