"""Files of the host in the guest: those that uprobe definitions name, and the programs run there."""
