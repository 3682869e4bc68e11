#!/bin/bash
# libtracefs (Debian's libtracefs-dev) in the view of `fakefs run`, by way of a program that uses most of it.
# shellcheck disable=SC2154 # set in lib.sh
set -euo pipefail
# shellcheck disable=SC1091 # it is checked by itself
. "$(dirname "$0")/lib.sh"
need libtracefs-dev
need libtraceevent-dev
need gcc
need pkg-config
enter "$@"
source=$(realpath "$(dirname "$0")/libtracefs.c")
cd "$(mktemp -d)"
trap 'rm -r "$PWD"' EXIT

read -ra flags < <(pkg-config --cflags --libs libtracefs)
gcc -O -Wall -Wextra -Werror -D_GNU_SOURCE -o client "$source" "${flags[@]}"
timeout 60 ./client
