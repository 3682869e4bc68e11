#!/usr/bin/env bash
# What the kernel says about a wrong probe, and where in the line it is wrong. Usage: examples/errors.sh DIR
# shellcheck source=/dev/null  # session.sh
source "${BASH_SOURCE%/*}/session.sh"

heading "A wrong probe: error_log tells what is wrong, and its caret where"
show 'echo > error_log'
refused "echo 'p:myprobe vfs_raed' >> dynamic_events"
refused "echo 'p:myprobe vfs_read count=\$arg3:u63' >> dynamic_events"
show 'cat error_log'
