"""Events of perf_event_open(2) that the guest's kernel counts and samples, for programs of `fakefs run`."""
