"""How the factors of a LoRA multiply: one file a form, and a table of them."""
