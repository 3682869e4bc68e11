"""Watchpoint probes, `w:` dynamic events, on a guest whose kernel has none: grammar, errors, read-back and states.

What parses, shows and words errors is pure logic; `carrier`, `structs`, `table` and `files` are what knows the guest.
Lines are `str`, decoded as latin-1: a column is a byte.
"""
