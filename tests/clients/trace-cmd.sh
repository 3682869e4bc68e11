#!/bin/bash
# trace-cmd in the view of `fakefs run`: list, start, show, stop, stream, extract, restore, record with and without splice,
# report, hist, reset.
# shellcheck disable=SC2154 # set in lib.sh
set -euo pipefail
# shellcheck disable=SC1091 # it is checked by itself
. "$(dirname "$0")/lib.sh"
need trace-cmd
need binutils
enter "$@"
cd "$(mktemp -d)"
trap 'rm -r "$PWD"' EXIT

expect "list of tracers" 'function_graph function nop' trace-cmd list -t
expect "list of events" '^sched:sched_switch$' trace-cmd list -e sched:sched_switch
expect "list of functions" '^vfs_read$' trace-cmd list -f '^vfs_read$'
expect "stat" 'All disabled' trace-cmd stat

trace-cmd start -e sched:sched_switch
expect "start has enabled the event" '^1$' cat "$tracing"/events/sched/sched_switch/enable
expect "show" 'sched_switch: prev_comm=' trace-cmd show
trace-cmd stop
expect "stop has stopped" '^0$' cat "$tracing"/tracing_on
trace-cmd extract >/dev/null
expect "report of what was extracted" 'sched_switch: ' trace-cmd report
trace-cmd reset
expect "reset has reset" '^0$' cat "$tracing"/events/sched/sched_switch/enable

# Each line is an open(2) of the guest's; so are those of libraries, by which the shell begins.
loop='for ((i = 0; i < 200; i++)); do read -r line; done < <(yes); for ((i = 0; i < 200; i++)); do
	read -r line </sys/kernel/tracing/tracing_on; done'
for way in "" --nosplice; do
	trace-cmd record $way -e syscalls:sys_enter_openat bash -c "$loop" >/dev/null
	expect "record ${way:-with splice}: opens, none lost" '^2[0-9][0-9]$' sh -c \
		"trace-cmd report 2>&1 | grep -c 'bash-.*sys_enter_openat'"
done

# Many times what a small buffer holds, of which each one has to arrive.
marks="for ((i = 0; i < 4000; i++)); do echo marker; done >$tracing/trace_marker"
for way in "" --nosplice; do
	trace-cmd record $way -b 64 -p nop bash -c "$marks" >/dev/null
	expect "record ${way:-with splice}: 4000 of 4000" '^4000$' sh -c "trace-cmd report 2>/dev/null | grep -c 'print:.*marker'"
done
trace-cmd record -e sched:sched_switch cat "$tracing"/available_events >/dev/null
expect "hist" 'sched_switch #[0-9]+' trace-cmd hist

# A poll of the raw file waits until so much of the buffer is full, half of it by default: as on every kernel.
echo 0 >"$tracing"/buffer_percent
expect "stream" 'sched_switch: ' trace-cmd stream -e sched:sched_switch cat "$tracing"/available_events
echo 50 >"$tracing"/buffer_percent

trace-cmd start -e sched:sched_switch
cat "$tracing"/available_events >/dev/null
trace-cmd stop
dd if="$tracing"/per_cpu/cpu0/trace_pipe_raw of=raw.cpu0 bs=4096 iflag=nonblock 2>/dev/null || true
trace-cmd restore -o restored.dat raw.cpu0 >/dev/null
expect "restore of raw pages" 'sched_switch: ' trace-cmd report -i restored.dat
trace-cmd reset
expect "function tracer" 'function: +vfs_open' sh -c \
	"trace-cmd record -p function -l vfs_open cat $tracing/tracing_on >/dev/null && trace-cmd report"
trace-cmd reset
echo "p:echoes /usr/bin/bash:0x$(nm -D /usr/bin/bash | awk '$3 == "echo_builtin" { print $1 }') word=+0(+0(+8(%di))):string" \
	>>"$tracing"/uprobe_events
expect "uprobe in a program of the host" 'bash-[0-9]+ .*echoes: +\([0-9a-f]+\) word="words"' sh -c \
	"trace-cmd record -e uprobes:echoes bash -c 'echo words' >/dev/null && trace-cmd report"
exit "$failed"
