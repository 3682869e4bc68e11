# shellcheck shell=bash disable=SC2034
# What the client scripts share: the package, the view, assertions.
#
# A script runs itself a second time inside `fakefs run`; `inside` tells which time it is. No tracing client is ever
# started outside, where as root it would find or mount the host's own tracefs.

fakefs=${FAKEFS:-$(dirname "$0")/../../.venv/bin/fakefs}
tracing=/sys/kernel/tracing
failed=0

need() { # PACKAGE: have it installed
	dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed && return
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$1" >/dev/null ||
		{ echo "$(basename "$0"): cannot install the package $1: run as root: apt-get install $1" >&2; exit 1; }
}

enter() { # ARGUMENTS...: go on inside, unless we are
	[[ ${FAKEFS_INSIDE-} ]] || FAKEFS_INSIDE=1 exec "$fakefs" run -- "$0" "$@"
	[[ $(stat -f -c %t "$tracing") = 65735546 ]] || { echo "$tracing is not a guest's: going no further" >&2; exit 99; }
}

expect() { # WHAT PATTERN COMMAND...: its output, errors included, has a line that matches the extended pattern
	local what=$1 pattern=$2 out
	shift 2
	out=$(timeout -s INT -k 5 60 "$@" 2>&1) || true
	if grep -Eq -- "$pattern" <<<"$out"; then
		echo "ok    $what"
	else
		printf 'FAIL  %s: no line matches %s in:\n%s\n' "$what" "$pattern" "$(tail -n 20 <<<"$out")"
		failed=1
	fi
}

activity() { # open, read and close files of the guest until the script ends
	while :; do
		cat "$tracing"/tracing_on >/dev/null
		sleep 0.1
	done &
	trap 'kill $!' EXIT
}
