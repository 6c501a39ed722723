"""Weight files: their headers and bytes, and what their keys and numbers mean."""
