"""Loadable kernel modules for the guest: headers, a build of one C file, loading it into a running mount."""
