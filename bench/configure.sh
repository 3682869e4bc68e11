#!/bin/bash
# Does what configure scripts do, in the working directory: some 200 commands, 60 of them programs. Its output and exit
# status are the same each time. With a locale as the argument programs open its files, thirty each.
set -u
export LC_ALL="${1:-C}" LANGUAGE=C # C, as in the scripts that autoconf makes
exec 2>&1
trap 'rm -rf conf.* config.*' EXIT

check() { # NAME COMMAND...: say whether it succeeds
	local name=$1
	shift
	printf 'checking for %s... ' "$name"
	if "$@" >conf.out 2>&1; then echo yes; else echo no; fi
	cat conf.out >>config.log
	rm -f conf.out
}

echo "# defines" >config.h
for header in stdio stdlib string unistd fcntl nosuch; do
	cat >conf.c <<-END
		#include <$header.h>
		int main(void) { return 0; }
	END
	check "$header.h" test -e "/usr/include/$header.h"
	upper=$(echo "$header" | tr "[:lower:]" "[:upper:]")
	[[ $header = nosuch ]] || echo "#define HAVE_${upper}_H 1" >>config.h
	mv conf.c "conf.$header.c"
done
for program in sh cat sed awk nosuchprogram; do
	check "$program" command -v "$program"
done
check "a program that fails" sh -c 'exit 3'
check "a program that is killed" sh -c 'kill -TERM $$'
sh -c 'exit 42'; echo "status $?"
(umask 077; : >conf.private; stat -c %a conf.private)
mkdir -p conf.dir/a/b; cd conf.dir/a/b || exit 1
touch one two; ln one three; ln -s one four; chmod 640 two; cp two five; mv five six
cd ../../..
find conf.dir | sort | sed 's/^/  /'
tar cf conf.tar conf.dir; tar tf conf.tar | wc -l
sed -e 's,@prefix@,/usr/local,' -e 's/@name@/fakefs/' <<-'END' >config.mk
	prefix = @prefix@
	name = @name@
END
cat config.mk config.h
for number in 1 2 3; do echo "$number" >"conf.$number" & done
wait
cat conf.1 conf.2 conf.3 | awk '{sum += $1} END {print sum}'
( trap 'echo trapped' USR1; kill -USR1 $BASHPID; sleep 0.01; echo after )
sleep 10 & kill $!; wait $!; echo "status $?"
for number in 1 2 3 4 5 6 7 8 9 10; do sh -c "echo \$(($number * $number))"; done | paste -sd+ | tr -d '\n'; echo
exit 7
