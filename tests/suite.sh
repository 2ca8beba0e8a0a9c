# shellcheck shell=bash
# Sourced by tests/setup and tests/systemd-box: packages of another Debian suite come from where
# this machine's own come from.

# Prints the path of a file, $2 with an ending, that holds the machine's own source of packages with
# its suite replaced by $1; deb822 or one-line, as the machine has it.
source_of_suite() {
    local suite=$1 own file
    own=$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        # Paragraphs are kept whole; comment lines inside them are dropped.
        awk -v RS= -v ORS='\n\n' -v own="$own" -v suite="$suite" '
            $0 ~ "(^|\n)Suites:([^\n]*[ \t])?" own "([ \t][^\n]*)?(\n|$)" {
                n = split($0, lines, "\n"); text = ""
                for (i = 1; i <= n; i++) {
                    if (lines[i] ~ /^#/) continue
                    if (lines[i] ~ /^Suites:/) lines[i] = "Suites: " suite
                    text = text lines[i] "\n"
                }
                printf "%s\n", text
            }' "$file" >"$2.sources"
        [ -s "$2.sources" ] && { echo "$2.sources"; return 0; }
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -e "$file" ] || continue
        awk -v own="$own" -v suite="$suite" '
            $1 == "deb" { for (i = 2; i <= NF; i++) if ($i == own) { $i = suite; print; next } }
        ' "$file" >"$2.list"
        [ -s "$2.list" ] && { echo "$2.list"; return 0; }
    done
    return 1
}
