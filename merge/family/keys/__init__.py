"""Translations between spellings of keys; each is a table and one check that it is one-to-one."""
