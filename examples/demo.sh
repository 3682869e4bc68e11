#!/usr/bin/env bash
# A short tour: mount a kernel's tracefs on a fresh directory, do what a tutorial does, unmount. `make run` runs it.
# Usage: examples/demo.sh [OPTIONS OF fakefs mount]
set -euo pipefail

here=$(cd -- "${BASH_SOURCE%/*}" && pwd)
fakefs=$here/../.venv/bin/fakefs
[[ -x $fakefs ]] || fakefs=$(command -v fakefs) || {
	echo "demo: no fakefs here: make setup" >&2
	exit 1
}

directory=$(mktemp -d "${TMPDIR:-/tmp}/tracing.XXXXXX")
leave() {
	if mountpoint -q "$directory"; then
		"$fakefs" umount "$directory" || "$fakefs" umount --lazy "$directory" || true
	fi
	rmdir "$directory"
}
trap leave EXIT
trap 'exit 130' INT TERM

echo "\$ fakefs mount${*:+ $*} $directory"
"$fakefs" mount "$@" "$directory"
echo "\$ cd $directory; cat available_tracers"
cat "$directory/available_tracers"
for example in kprobe kretprobe histogram latency uprobe wprobe errors; do
	"$here/$example.sh" "$directory"
done

cat <<END

The tour is over. To go on by hand:

  source .venv/bin/activate
  mkdir -p /tmp/tracing
  fakefs mount /tmp/tracing
  cd /tmp/tracing
  ...
  cd -
  fakefs umount /tmp/tracing

The same again, one piece at a time: examples/kprobe.sh /tmp/tracing, and its neighbours.
END
