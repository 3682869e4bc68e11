"""A guest kernel's tracefs as a directory on the host."""
