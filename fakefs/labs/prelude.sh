# What a lab's `check` may use. The working directory is the tracefs; $TRACE is a copy of `trace`, taken with tracing
# off; $ANSWER is what the student answered, $SECRET the word drawn at the start.

# want TEXT COMMAND [ARGUMENT ...]: something that has to be so. The first thing that is not ends the check.
want() {
    wanted=$1
    shift
    if "$@" >/dev/null 2>&1; then
        printf 'ok %s\n' "$wanted"
    else
        printf 'no %s\n' "$wanted"
        exit 1
    fi
}

# defined PATTERN: a line of dynamic_events is like this (an extended regular expression).
defined() { grep -Eq -- "$1" dynamic_events; }

# enabled GROUP/EVENT
enabled() { [ "$(cat "events/$1/enable")" != 0 ]; }

# traced PATTERN: a line of the trace is like this.
traced() { grep -aEv '^#' "$TRACE" | grep -aEq -- "$1"; }

# hits PATTERN NUMBER: at least so many lines of the trace are like this.
hits() { [ "$(grep -aEv '^#' "$TRACE" | grep -aEc -- "$1")" -ge "$2" ]; }

# answered [TEXT]: the answer is this (without, the secret), whatever the case and the blanks around it.
answered() { [ "$(plain "$ANSWER")" = "$(plain "${1-$SECRET}")" ]; }
plain() { printf '%s\n' "$1" | tr 'A-Z\t' 'a-z ' | sed 's/^ *//; s/ *$//'; }
