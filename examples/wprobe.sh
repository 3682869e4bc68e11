#!/usr/bin/env bash
# Watchpoint events: who writes a variable, and who holds an object while it lives. Usage: examples/wprobe.sh DIR
if bin=$(cd -- "${BASH_SOURCE%/*}/../.venv/bin" 2>/dev/null && pwd); then PATH=$PATH:$bin; fi
# shellcheck source=/dev/null  # session.sh
source "${BASH_SOURCE%/*}/session.sh"

heading "A wprobe: who writes jiffies, and how it came to that"
show "echo 'w:my_jiffies w@jiffies:8 value=+0(\$addr)' >> dynamic_events"
show 'cat dynamic_events'
show 'echo 1 > events/wprobes/my_jiffies/enable'
show 'echo stacktrace >> events/wprobes/my_jiffies/trigger'
show 'until grep -q "<stack trace>" trace; do sleep 0.01; done'
show 'echo 0 > tracing_on'
show 'grep -m 1 -B 1 -A 14 "<stack trace>" trace'
show "echo '!stacktrace' >> events/wprobes/my_jiffies/trigger"
show 'echo 0 > events/wprobes/my_jiffies/enable'
show "echo '-:my_jiffies' >> dynamic_events"
show 'echo > trace'
show 'echo 1 > tracing_on'

grep -q 'f\[:' README || exit 0 # the rest needs fprobe events
kill=$(grep -m 1 -xE '(__)?dentry_kill' available_filter_functions)
heading "An object, from its allocation to its end: who changes the reference count of a file's dentry"
show "echo 'w2:refs w!@-1:4 was=\$old:s32 count=\$value:s32' >> dynamic_events"
show "echo 'f:born d_alloc_parallel%return dentry=\$retval name=+0(+8(\$arg2)):string' >> dynamic_events"
show "echo 'f:dies $kill dentry=\$arg1' >> dynamic_events"
show "echo 'set_wprobe:refs:(dentry)dentry->d_lockref.count if name == \"secret\"' >> events/fprobes/born/trigger"
show "echo 'clear_wprobe:refs:(dentry)dentry->d_lockref.count' >> events/fprobes/dies/trigger"
show "fakefs exec . -- sh -c 'echo a > /tmp/secret; cat /tmp/secret; rm /tmp/secret'"
show 'grep "refs: " trace'
show "echo '!set_wprobe:refs:dentry' >> events/fprobes/born/trigger"
show "echo '!clear_wprobe:refs' >> events/fprobes/dies/trigger"
show "echo '-:refs' >> dynamic_events"
show "echo '-:born' >> dynamic_events"
show "echo '-:dies' >> dynamic_events"
show 'echo > trace'
