#!/usr/bin/env bash
# A histogram made by the kernel: how often reads of each size occur. Usage: examples/histogram.sh DIR
# shellcheck source=/dev/null  # session.sh
source "${BASH_SOURCE%/*}/session.sh"

heading "A histogram of read sizes: nothing is recorded, the kernel counts"
show "echo 'p:myprobe vfs_read count=\$arg3' >> dynamic_events"
show "echo 'hist:keys=count:sort=hitcount.descending if comm == \"dd\"' > events/kprobes/myprobe/trigger"
show "for size in 1 16 512 4096; do dd if=trace_clock of=/dev/null bs=\$size status=none; done"
show 'cat events/kprobes/myprobe/hist'
show "echo '!hist:keys=count:sort=hitcount.descending if comm == \"dd\"' > events/kprobes/myprobe/trigger"
show "echo '-:myprobe' >> dynamic_events"
