# shellcheck shell=bash
# Sourced by tests/bench/* after tests/host.sh: times of commands in the node, and rows of a table
# that say whether what was promised holds. Needs $rounds; gives $failed.

now() { local time=${EPOCHREALTIME/./}; echo "$((time / 1000))"; }
median() { sort -n | sed -n "$(((rounds + 1) / 2))p"; }
seconds() { printf '%d.%03d s' "$(($1 / 1000))" "$(($1 % 1000))"; }

once() { # command... : its milliseconds
    local began
    began=$(now)
    "$@" >"$folder/out" 2>"$folder/err" || [ $? = "${allowed:-0}" ] || { cat "$folder/err" >&2; exit 1; }
    echo "$(($(now) - began))"
}
time_of() { # command... : its milliseconds, median of the rounds
    local round
    for round in $(seq "$rounds"); do once "$@"; done | median
}
# What reaching into the node costs is nobody's.
entry=$(time_of inside true)
net() { echo "$(($1 > entry ? $1 - entry : 0))"; }

failed=0
row() { # what, figure, limit as shown, figure as number, limit as number
    local verdict=
    if [ $# -gt 3 ]; then
        if [ "$4" -le "$5" ]; then verdict='holds'; else verdict='DOES NOT HOLD' failed=1; fi
    fi
    printf '%-58s %12s   %-18s %s\n' "$1" "$2" "${3-}" "$verdict"
}
