"""A PC that runs a stock Linux kernel on Unicorn: CPU, memory, devices, boot protocol, snapshots and the guest's agent.

It knows nothing of tracing beyond breakpoints and watchpoints, and nothing of `fakefs`.
"""
