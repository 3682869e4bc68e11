#!/bin/bash
# The kernel's own ftracetest, unmodified, from Debian's linux-source package, in the view of `fakefs run`.
# Writes ftracetest.tsv: each test, its result here and on a real kernel, and the reason for a difference.
# Usage: ftracetest.sh [VERSION], the X.Y of linux-source-X.Y; default: the newest there is.
# shellcheck disable=SC2154 # set in lib.sh
set -euo pipefail
here=$(dirname "$(realpath "$0")")
# shellcheck disable=SC1091 # it is checked by itself
. "$here/lib.sh"

version=${1:-$(apt-cache search --names-only '^linux-source-[0-9.]+$' | sed 's/^linux-source-\([0-9.]*\) .*/\1/' |
	sort -V | tail -n 1)}
need "linux-source-$version"
work=$(realpath "${BUILD:-$here/../../build}")/ftracetest-$version
suite=linux-source-$version/tools/testing/selftests/ftrace
if [[ ! -d $work/$suite ]]; then
	mkdir -p "$work"
	tar -C "$work" -xf "/usr/src/linux-source-$version.tar.xz" "$suite"
fi
rm -rf "$work/logs"
echo "running $work/$suite/ftracetest, some minutes"
begun=$SECONDS
cd "$work/$suite"
# shellcheck disable=SC2016
"$fakefs" run -- sh -c '[ "$(stat -f -c %t /sys/kernel/tracing)" = 65735546 ] && exec ./ftracetest -k -l "$1"' sh \
	"$work/logs" >"$work/output" || true
echo "$((SECONDS - begun)) s"
python3 "$here/ftracetest.py" "$work/output" "$work/$suite/test.d"
