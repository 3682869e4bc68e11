"""Watchpoint probes, `w:` dynamic events, on a guest whose kernel has none: grammar, errors, read-back and states.

Pure logic: nothing here touches the guest, FUSE or trio. Lines are `str`, decoded as latin-1: a column is a byte.
"""
