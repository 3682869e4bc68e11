"""Labs: exercises in kernel tracing, each a directory of data that a teacher writes (docs/labs-teachers.md)."""
