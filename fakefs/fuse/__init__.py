"""`fakefs.files.Files` as a FUSE mount: the only place that imports pyfuse3.

`session.serve()` mounts and serves; `options` can be imported without pyfuse3.
"""
