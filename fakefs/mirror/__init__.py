"""Makes the system calls of the host's processes in the guest too, so that its probes see them.

On the host's side `seccomp` has the kernel notify us of calls, `calls` says of which, `launch` sets that up for a
program and its descendants, and the `recorder`, a process of its own, notes each call with what it needs to be
repeated (`hostpaths`), lets it go on, and tells the daemon (`records`). Calls that only look at a file have gone on
before: `notes`, the hot part of which is in C.

There, `mirror` takes the notes in order and has each process's shadow make the call; `guestpaths` first makes the
guest's files equal to the host's, as far as the call will look at them.
"""
