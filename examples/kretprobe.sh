#!/usr/bin/env bash
# A kretprobe: what a function returns, and to whom. Usage: examples/kretprobe.sh DIR
# shellcheck source=/dev/null  # session.sh
source "${BASH_SOURCE%/*}/session.sh"

heading "A kretprobe: \$retval is how many bytes vfs_read() has read, 0 at the end of the file"
show "echo 'r:myretprobe vfs_read got=\$retval:s64' >> dynamic_events"
show "echo 'got >= 0' > events/kprobes/myretprobe/filter"
show 'echo 1 > events/kprobes/myretprobe/enable'
show 'cat tracing_on current_tracer trace_clock >/dev/null'
show 'echo 0 > tracing_on'
show 'grep -v "^#" trace'
show 'echo 1 > tracing_on'
show 'echo 0 > events/kprobes/myretprobe/enable'
show "echo '-:myretprobe' >> dynamic_events"
