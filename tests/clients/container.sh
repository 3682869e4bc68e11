#!/bin/bash
# `fakefs run` in an unprivileged container: bubblewrap's, with all namespaces of its own, uid 1000 and no capabilities.
# shellcheck disable=SC2154 # set in lib.sh
set -euo pipefail
# shellcheck disable=SC1091 # it is checked by itself
. "$(dirname "$0")/lib.sh"
need bubblewrap
"$fakefs" run -- true # boots if need be

container=(bwrap --unshare-all --die-with-parent --bind / / --dev /dev --dev-bind /dev/fuse /dev/fuse --proc /proc
	--tmpfs /run --uid 1000 --gid 1000 --cap-drop ALL)
expect "no capabilities" '^CapEff:.0+$' "${container[@]}" grep CapEff /proc/self/status
expect "a guest's tracefs" '^65735546$' "${container[@]}" "$fakefs" run -- stat -f -c %t "$tracing"
probe="cd $tracing; echo p:mine do_truncate >kprobe_events; echo 1 >events/kprobes/enable; : >/run/own; : >/run/own; rm /run/own; cat trace"
expect "a probe on what a shell does" 'sh-[0-9]+ .* mine: \(do_truncate' "${container[@]}" "$fakefs" run -- sh -c "$probe"
exit "$failed"
