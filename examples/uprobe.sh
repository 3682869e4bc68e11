#!/usr/bin/env bash
# uprobes on a program of this machine and on a library, hit where it runs: in the guest. Usage: examples/uprobe.sh DIR
if bin=$(cd -- "${BASH_SOURCE%/*}/../.venv/bin" 2>/dev/null && pwd); then PATH=$PATH:$bin; fi
# shellcheck source=/dev/null  # session.sh
source "${BASH_SOURCE%/*}/session.sh"

# Where a function is, in the notation of a definition. In the files of these two, addresses are offsets.
place() {
	printf '%s:0x%s' "$1" "$(nm -D "$1" | awk -v name="$2" '$2 == "T" && $3 ~ "^" name "(@|$)" { print $1 }')"
}
bash=$(command -v bash)
libc=$(ldd "$bash" | awk '$1 == "libc.so.6" { print $3 }')
echo_builtin=$(place "$bash" echo_builtin)
exit_function=$(place "$libc" exit)

heading "A uprobe on bash's echo, whose argument is a list of words; and one on its return"
show "echo 'p:echo $echo_builtin word=+0(+0(+8(%di))):string' >> uprobe_events"
show "echo 'r:echoed $echo_builtin status=\$retval:s32' >> uprobe_events"
show 'echo 1 > events/uprobes/enable'
show "fakefs exec --host-binary . -- bash -c 'echo hello; echo world'"
show 'echo 0 > events/uprobes/enable'
show 'cat trace'
show 'cat uprobe_profile'
show 'echo > uprobe_events; echo > trace'

heading "A uprobe on a library: every program that has it"
show "echo 'p:exit $exit_function status=%di:s32' >> uprobe_events"
show 'echo 1 > events/uprobes/exit/enable'
show 'fakefs exec --host-binary . -- ls -d /proc/self'
show "fakefs exec --host-binary . -- bash -c 'exit 3' || true"
show 'echo 0 > events/uprobes/exit/enable'
show 'grep -v "^#" trace'
