# Sourced by the examples, not run: go to the mount given as the only argument, show each command before it runs, and
# leave no probe, trigger or workload behind.
# shellcheck shell=bash

set -euo pipefail

if [[ $# != 1 || ! -e $1/dynamic_events ]]; then
	echo "usage: $0 DIR   (DIR: where fakefs has mounted a tracefs)" >&2
	exit 2
fi
cd -- "$1"
workload=

heading() {
	if [[ -t 1 ]]; then printf '\n\e[1;36m# %s\e[0m\n' "$*"; else printf '\n# %s\n' "$*"; fi
}

# A reader that `head` has left ends by SIGPIPE (141), as it should.
show() {
	printf '$ %s\n' "$1"
	eval "$1" || [[ $? == 141 ]]
}

# Show a command that must fail, and say what bash says of it, without our line number.
refused() {
	local message
	printf '$ %s\n' "$1"
	if message=$(eval "$1" 2>&1); then
		echo "$0: this was accepted, though it is wrong" >&2
		return 1
	fi
	echo "bash: ${message#*: line *: }"
}

# Show a loop, run it in the background until `stop`.
start() {
	printf '$ %s &\n' "$1"
	(eval "$1") &
	workload=$!
}

# Its death is bash's to report; nobody wants to read that.
stop() {
	printf '$ kill %%1\n'
	end_workload
}

end_workload() {
	[[ -z $workload ]] || kill "$workload" 2>/dev/null || true
	wait 2>/dev/null || true
	workload=
}

# Truncating a trigger file takes histograms away. The one of `leave` holds on to `enter` and `read_time`: it goes first.
clean() {
	end_workload
	local event
	for event in events/kprobes/{leave,enter,myprobe,myretprobe} events/synthetic/read_time events/uprobes/{echo,echoed,exit}; do
		[[ ! -e $event ]] || { : >"$event/trigger"; echo 0 >"$event/enable"; }
	done
	echo >dynamic_events
	echo >trace
	echo 1 >tracing_on
}
trap clean EXIT
trap 'exit 130' INT TERM
