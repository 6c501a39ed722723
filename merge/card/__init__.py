"""The model card: README.md of an export, rendered from the export's own records.

Everything in it is read from the folder, so that it can be rendered again after a verification and
before publishing, and of a folder that was downloaded. Texts of the records are not trusted: no
recipe puts HTML, links or front matter into its card.
"""
