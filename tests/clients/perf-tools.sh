#!/bin/bash
# perf-tools (Debian's perf-tools-unstable) in the view of `fakefs run`, syscount and perf-stat-hist by means of perf.
# What does not work here does not on a real kernel of these versions either: docs/run.md.
# shellcheck disable=SC2154 # set in lib.sh
set -euo pipefail
# shellcheck disable=SC1091 # it is checked by itself
. "$(dirname "$0")/lib.sh"
need perf-tools-unstable
need gawk
enter "$@"

snoop "opensnoop: what a shell writes" '^bash +[0-9]+ +\w+ /dev/full' "bash -c ': >/dev/full'" opensnoop-perf
snoop "opensnoop: what a command reads" '^head +[0-9]+ +\w+ /etc/passwd' 'head /etc/passwd >/dev/null' opensnoop-perf
# shellcheck disable=SC2016 # for the inner shell
snoop "killsnoop" '^bash +([0-9]+) +\1 +18 +0' "bash -c 'kill -CONT \$\$'" killsnoop-perf
snoop "tpoint: what a shell executes" 'sched_process_exec: filename=/usr/bin/head' 'head </dev/null' \
	tpoint-perf sched:sched_process_exec
snoop "uprobe: what a shell echoes" 'bash-[0-9]+ .* echo_builtin: \(0x[0-9a-f]+\) arg1="words"' \
	"bash -c 'echo words' >/dev/null" uprobe-perf "'p:bash:echo_builtin +0(+0(+8(%di))):string'"
expect "syscount -c of a command" '^openat +[1-9][0-9]*$' syscount-perf -c head -c 1 /etc/passwd
expect "syscount -c for a time" '^openat +[1-9][0-9]*$' syscount-perf -c -d 1
cd "$(mktemp -d)"
# shellcheck disable=SC2016 # for the inner shell
counted=(sh -c '"$@" >out; cat out' sh) # through a pipe perf would write its own data
expect "syscount of a command" '^head +[1-9][0-9]*$' "${counted[@]}" syscount-perf head -c 1 /etc/passwd
expect "syscount by process" '^[0-9]+ +head +[1-9][0-9]*$' "${counted[@]}" syscount-perf -v head -c 1 /etc/passwd
expect "syscount by process and name" 'head +openat +[1-9]' "${counted[@]}" syscount-perf -cv head -c 1 /etc/passwd
expect "syscount, until Ctrl-C" '^perf +[1-9]' "${counted[@]}" timeout -s INT 5 syscount-perf
expect "perf-stat-hist" '^ +1048576 -> +: [1-9]' perf-stat-hist-perf syscalls:sys_enter_openat dfd 1
activity
hit='cat-[0-9]+ +\[000\].*myopen: \(vfs_open\+0x[0-9a-f]+/0x[0-9a-f]+\)'
expect "kprobe, until Ctrl-C" "$hit" timeout -s INT 3 kprobe-perf 'p:myopen vfs_open'
expect "kprobe with an argument" "myopen: .* flags=[0-9]+" kprobe-perf -d 1 'p:myopen vfs_open flags=+0(%si):u32'
expect "kprobe with a filter" "$hit" kprobe-perf -d 1 'p:myopen vfs_open' 'common_pid > 0'
opened='p:myopen do_sys_openat2 filename=+0(%si):string'
expect "kprobe with a string" 'myopen: .* filename="/sys/kernel/tracing/tracing_on"' kprobe-perf -d 1 "$opened"
expect "kprobe with a filter of strings" 'filename="/.*ing_on"' kprobe-perf -d 1 "$opened" 'filename ~ "*ing_on"'
expect "kprobe with stacks" '=> (do_sys_openat2|path_openat)' kprobe-perf -s -d 1 'p:myopen vfs_open'
expect "kprobe -H prints the header" '# tracer: nop' kprobe-perf -H -d 1 'p:myopen vfs_open'
expect "functrace with a glob" 'vfs_(open|read|write) <-' functrace-perf -d 1 'vfs_*'
expect "functrace -H" 'do_nanosleep <-' functrace-perf -H -d 1 do_nanosleep
expect "funcgraph -m 3" 'do_nanosleep\(\) \{' funcgraph-perf -m 3 -d 1 do_nanosleep
expect "funcgraph -D" 'vfs_open\(\) \{' funcgraph-perf -Dm 2 -d 1 vfs_open
expect "tpoint with stacks" '=> ' tpoint-perf -s -d 1 sched:sched_switch
expect "execsnoop, without one of its three functions" 'adding a kprobe for execve' execsnoop-perf -d 1
# shellcheck disable=SC2016 # it is the kernel's
expect "kretprobe" 'myret: .*<- vfs_open' kprobe-perf -d 1 'r:myret vfs_open $retval'
expect "functrace" 'vfs_open <-' functrace-perf -d 1 vfs_open
expect "funcgraph" 'vfs_open\(\) \{' funcgraph-perf -d 1 -m 2 vfs_open
expect "tpoint" 'sched_wakeup: comm=' tpoint-perf -d 1 sched:sched_wakeup
expect "tpoint with a filter" 'sched_switch: .*next_comm=cat' tpoint-perf -d 1 sched:sched_switch 'next_comm == "cat"'
expect "tpoint of a disk, of which there is none" 'Ending' tpoint-perf -s -d 1 block:block_rq_insert 'rwbs ~ "*R*"'
expect "iosnoop, likewise" 'COMM +PID +TYPE' iosnoop-perf -d 1
expect "tpoint -l" '^sched:sched_switch$' tpoint-perf -l
# The kernel has no function profiler in Debian's configuration: the answer is a real kernel's.
if [[ -e "$tracing"/function_profile_enabled ]]; then
	expect "funccount" '^vfs_open +[0-9]+' funccount-perf -d 1 'vfs_*'
else
	expect "funccount, without CONFIG_FUNCTION_PROFILER" 'Have CONFIG_FUNCTION_PROFILER' funccount-perf -d 1 'vfs_*'
fi
echo function >"$tracing"/current_tracer
expect "reset-ftrace" '^Done\.$' reset-ftrace-perf
expect "reset-ftrace has reset" '^nop$' cat "$tracing"/current_tracer
exit "$failed"
