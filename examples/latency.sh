#!/usr/bin/env bash
# How long a function takes: entry and return joined by a synthetic event. Usage: examples/latency.sh DIR
# shellcheck source=/dev/null  # session.sh
source "${BASH_SOURCE%/*}/session.sh"

heading "Latency: the time from vfs_read()'s entry to its return becomes an event of its own"
show "echo 's:read_time u64 ns' >> dynamic_events"
show "echo 'p:enter vfs_read' >> dynamic_events"
show "echo 'r:leave vfs_read' >> dynamic_events"
show "echo 'hist:keys=common_pid:began=common_timestamp if comm == \"cat\"' > events/kprobes/enter/trigger"
show "echo 'hist:keys=common_pid:ns=common_timestamp-\$began:onmatch(kprobes.enter).read_time(\$ns)' > events/kprobes/leave/trigger"
show 'echo 1 > events/synthetic/read_time/enable'
show "echo 'hist:keys=ns.log2' > events/synthetic/read_time/trigger"
show 'for i in 1 2 3 4 5; do cat tracing_on trace_clock available_tracers; done >/dev/null'
show 'echo 0 > tracing_on'
show 'grep -v "^#" trace | head -n 6'
show 'cat events/synthetic/read_time/hist'
