#!/usr/bin/env bash
# Watchpoint events: who writes a variable, and what happens to one object while it lives. Usage: examples/wprobe.sh DIR
if bin=$(cd -- "${BASH_SOURCE%/*}/../.venv/bin" 2>/dev/null && pwd); then PATH=$PATH:$bin; fi
# shellcheck source=/dev/null  # session.sh
source "${BASH_SOURCE%/*}/session.sh"

heading "A wprobe: who writes jiffies, and how it came to that"
show "echo 'w:my_jiffies w@jiffies:8 value=+0(\$addr)' >> dynamic_events"
show 'cat dynamic_events'
show 'echo 1 > events/wprobes/my_jiffies/enable'
show 'echo stacktrace >> events/wprobes/my_jiffies/trigger'
show 'sleep 0.2'
show 'echo 0 > tracing_on'
show 'grep -m 1 -B 1 -A 14 "<stack trace>" trace'
show "echo '!stacktrace' >> events/wprobes/my_jiffies/trigger"
show 'echo 0 > events/wprobes/my_jiffies/enable'
show "echo '-:my_jiffies' >> dynamic_events"
show 'echo > trace'
show 'echo 1 > tracing_on'

grep -q 'f\[:' README || exit 0 # the rest needs fprobe events
kill=$(grep -m 1 -xE '(__)?dentry_kill' available_filter_functions)
heading "An object: a file's dentry, watched from its truncation to its release"
show "echo 'w:watch rw@-1:8 address=\$addr value=\$value' >> dynamic_events"
show "echo 'f:truncate do_truncate dentry=\$arg2' >> dynamic_events"
show "echo 'f:release $kill dentry=\$arg1' >> dynamic_events"
show "echo 'set_wprobe:watch:dentry' >> events/fprobes/truncate/trigger"
show "echo 'clear_wprobe:watch:dentry' >> events/fprobes/release/trigger"
show "fakefs exec . -- sh -c 'echo a > /tmp/file; echo b > /tmp/file; rm /tmp/file'"
show 'cat events/fprobes/truncate/trigger'
show 'echo 0 > tracing_on'
show 'grep -v "^#" trace | head -n 12'
show "echo '!set_wprobe:watch:dentry' >> events/fprobes/truncate/trigger"
show "echo '!clear_wprobe:watch:dentry' >> events/fprobes/release/trigger"
show "echo '-:watch' >> dynamic_events"
show "echo '-:truncate' >> dynamic_events"
show "echo '-:release' >> dynamic_events"
show 'echo 1 > tracing_on'
