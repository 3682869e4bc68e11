#!/bin/bash
# perf (Debian's linux-perf) in the view of `fakefs run`: list, probe and ftrace, which stay in the tracefs, and what goes
# on to perf_event_open(2), where tracepoints and probes are the guest's.
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
programs='/bin/true; /bin/true'
exec='sched:sched_process_exec'
expect "stat of a command" "^ +3 +$exec" perf stat -e "$exec" sh -c "$programs"
expect "stat of all" "^ +3 +$exec" perf stat -a -e "$exec" sh -c "$programs"
expect "stat of a group" '^ +2 +sched:sched_process_fork' perf stat -e "{$exec,sched:sched_process_fork}" sh -c "$programs"
expect "stat with a filter" "^ +2 +$exec" perf stat -e "$exec" --filter 'filename ~ "*/true"' sh -c "$programs"
expect "stat of all system calls" '^ +3 +syscalls:sys_enter_execve' perf stat -a -e 'syscalls:sys_enter_*' sh -c "$programs"
expect "stat at intervals" "^ +[0-9.]+ +[1-9]+ +$exec" perf stat -I 100 -e "$exec" sh -c "$programs; sleep 0.3"
cd "$(mktemp -d)"
expect "record of a command" 'Captured and wrote .* \(3 samples\)' perf record -o one -e "$exec" sh -c "$programs"
expect "script" "true +[0-9]+ \[000\] +[0-9.]+: $exec: filename=/bin/true" perf script -i one
expect "report" '66.67% +true' perf report -i one --sort comm --stdio
expect "record of all" 'Captured and wrote .* samples' perf record -a -o all -e 'syscalls:*' sh -c "$programs"
expect "nothing of it is lost" '^0$' sh -c 'perf script -i all --show-lost-events | grep -c LOST || true'
expect "script of all" 'true +[0-9]+ .*syscalls:sys_enter_openat: ' perf script -i all
expect "record through a pipe" "true .*$exec" sh -c "perf record -q -o - -e $exec true | perf script -i -"
expect "trace" 'openat\(dfd: CWD, .*= -1 ENOENT' perf trace -e openat head -c 1 /etc/passwd
expect "probe for stat" 'Added new event' perf probe --add vfs_open
expect "stat of a probe" '^ +[1-9][0-9]* +probe:vfs_open' perf stat -e probe:vfs_open head -c 1 /etc/passwd
expect "record of a probe with stacks" 'Captured' perf record -o stacks -g -e probe:vfs_open head -c 1 /etc/passwd
expect "script with stacks" 'do_sys_openat2\+0x[0-9a-f]+ \(\[kernel.kallsyms\]\)' perf script -i stacks
expect "probe -d again" 'Removed event: probe:vfs_open' perf probe -d vfs_open
expect "stat of the clock" '[0-9.]+ msec task-clock' perf stat -e task-clock:u true
exit "$failed"
