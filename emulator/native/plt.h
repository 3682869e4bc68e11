/* Functions of a shared library replaced by ours: its calls of its own exported functions go through a table of slots. */
#ifndef EMULATOR_PLT_H
#define EMULATOR_PLT_H

/* Point the PLT slot of the exported function at `old` to `new`; 0, or an errno when its library has no such slot. */
int plt_redirect(const void *old, const void *new);

#endif
