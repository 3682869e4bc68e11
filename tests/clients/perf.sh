#!/bin/bash
# perf (Debian's linux-perf) in the view of `fakefs run`: list, probe and ftrace, which stay in the tracefs.
# What goes on to perf_event_open(2), as record, stat, top and trace do, is the host's, where tracepoints are refused: they
# are known by numbers there, and those that perf finds here are the guest's.
# shellcheck disable=SC2154 # set in lib.sh
set -euo pipefail
# shellcheck disable=SC1091 # it is checked by itself
. "$(dirname "$0")/lib.sh"
need linux-perf
enter "$@"

expect "list" 'sched:sched_switch +\[Tracepoint event\]' perf list 'sched:*'
expect "list by TRACEFS_PATH" 'sched:sched_switch +\[Tracepoint' env TRACEFS_PATH="$tracing" perf list 'sched:*'
expect "probe -F" '^vfs_read$' perf probe -F vfs_read
expect "probe --add" 'Added new event' perf probe --add vfs_read
expect "it is in the guest" '^p:probe/vfs_read ' cat "$tracing"/kprobe_events
expect "probe -l" 'probe:vfs_read +\(on vfs_read\)' perf probe -l
expect "list has it" 'probe:vfs_read' perf list 'probe:*'
expect "probe -d" 'Removed event: probe:vfs_read' perf probe -d vfs_read
expect "ftrace, functions" 'cat-[0-9]+ .* vfs_read <-ksys_read' perf ftrace -T vfs_read -- cat "$tracing"/tracing_on
expect "ftrace, graph" 'vfs_read\(\) \{' perf ftrace -G vfs_read -- cat "$tracing"/tracing_on
expect "stat of a tracepoint" '<not supported> +sched:sched_switch' perf stat -e sched:sched_switch true
expect "stat of the clock" '[0-9.]+ msec task-clock' perf stat -e task-clock:u true
exit "$failed"
