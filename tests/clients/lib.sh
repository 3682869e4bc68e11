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

snoop() { # WHAT PATTERN ACTION TOOL...: the tool, on a terminal, tells of the action in such a line; then Ctrl-C ends it
	local what=$1 pattern=$2 action=$3 log text=
	shift 3
	log=$(mktemp)
	mkfifo "$log.keys"
	set -m # else it would ignore Ctrl-C
	script -qfec "$*" /dev/null <"$log.keys" >"$log" 2>&1 &
	set +m
	exec 9>"$log.keys"
	for ((i = 0; i < 60; i++)); do # with few programs, as the guest follows each
		sleep 1
		read -rd '' text <"$log" || true
		grep -Eq -- "$pattern" <<<"$text" && break
		[[ $text != *Tracing* ]] || eval "$action"
	done
	printf '\003' >&9
	exec 9>&-
	wait "$!" || true
	expect "$what" "$pattern" cat "$log"
	rm "$log" "$log.keys"
}

activity() { # open, read and close files of the guest until the script ends
	while :; do
		cat "$tracing"/tracing_on >/dev/null
		sleep 0.1
	done &
	trap 'kill $!' EXIT
}
