#!/usr/bin/env bash
# A kprobe with an argument: every read of a file, as a tutorial does it. Usage: examples/kprobe.sh DIR
# shellcheck source=/dev/null  # session.sh
source "${BASH_SOURCE%/*}/session.sh"
heading "A kprobe on vfs_read(); its third argument is how many bytes are wanted"
show "echo 'p:myprobe vfs_read count=\$arg3' >> dynamic_events"
show 'cat dynamic_events'
show 'echo 1 > events/kprobes/myprobe/enable'

heading "One program reads; its name and process id are in the trace"
show "sh -c 'echo \"cat will be process \$\$\"; exec cat tracing_on'"
show 'echo 0 > tracing_on'
show 'cat trace'
show 'echo 1 > tracing_on; echo > trace'

heading "The same as a stream. cat reads too: a filter keeps it out of its own stream"
start 'while :; do cat tracing_on; done >/dev/null'
show "sh -c 'echo \"common_pid != \$\$\" > events/kprobes/myprobe/filter; exec cat trace_pipe' | head -n 24"
stop
show 'cat kprobe_profile'
show 'echo 0 > events/kprobes/myprobe/enable'
show "echo '-:myprobe' >> dynamic_events"
