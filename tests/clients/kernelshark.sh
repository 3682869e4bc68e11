#!/bin/bash
# KernelShark opens what trace-cmd has recorded in the view of `fakefs run`; takes a picture if told where to.
# Usage: kernelshark.sh [PICTURE.png]
# shellcheck disable=SC2154 # set in lib.sh
set -euo pipefail
# shellcheck disable=SC1091 # it is checked by itself
. "$(dirname "$0")/lib.sh"
for package in trace-cmd kernelshark xvfb x11-utils imagemagick; do need "$package"; done
[[ ${1-} ]] && set -- "$(realpath "$1")"
enter "$@"
work=$(mktemp -d)
cd "$work"
trap 'kill $(jobs -p) 2>/dev/null; rm -r "$work"' EXIT

trace-cmd record -e sched -e syscalls:sys_enter_read bash -c \
	'for i in {1..30}; do read -r line <'"$tracing"'/tracing_on; cat '"$tracing"'/current_tracer; done' >/dev/null
expect "record" 'sched_switch:' trace-cmd report

mkfifo display
Xvfb -displayfd 3 -screen 0 1900x1100x24 -nolisten tcp 3>display 2>/dev/null &
read -r number <display
export DISPLAY=:$number XDG_RUNTIME_DIR=$work HOME=$work LIBGL_ALWAYS_SOFTWARE=1
# Not as root, which it warns of in a window of its own.
unshare --user --map-user=1000 --map-group=1000 kernelshark -i trace.dat >log 2>&1 &
# Until its window names the file.
shown="for ((i = 0; i < 600; i++)); do xwininfo -root -tree | grep 'trace\.dat' && exit; sleep 0.1; done; cat log"
expect "a window with the trace" 'trace\.dat' bash -c "$shown"
# Nothing tells when it has drawn itself.
[[ ! ${1-} ]] || { sleep 8 && import -window root -trim +repage +dither -colors 48 "$1"; }
exit "$failed"
