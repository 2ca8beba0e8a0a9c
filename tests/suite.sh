# shellcheck shell=bash
# Sourced by tests/setup, tests/systemd-box and tests/acceptance: packages of another Debian suite come
# from where this machine's own come from; images are made here.

# Debian's suites and the containerd that each of them has.
# shellcheck disable=SC2034 # for those that source this
releases=(bookworm:1.6 trixie:1.7 forky:2.1)

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

# make_image NAME CONFIG ARCHIVE FOLDER...: makes an image of which each folder is a layer; CONFIG is
# members of a JSON object.
make_image() {
    local name=$1 config=$2 archive=$3 folder work layer layers='' digests=''
    shift 3
    work=$(mktemp -d "$archive.XXXXXX")
    for folder; do
        tar -C "$folder" --numeric-owner -cf "$work/layer" .
        layer=$(sha256sum "$work/layer" | cut -d' ' -f1)
        mv "$work/layer" "$work/$layer.tar"
        layers+=${layers:+,}\"$layer.tar\" digests+=${digests:+,}\"sha256:$layer\"
    done
    printf '{"architecture":"%s","os":"linux","config":{%s},"rootfs":{"type":"layers","diff_ids":[%s]}}' \
        "$(dpkg --print-architecture)" "$config" "$digests" >"$work/config.json"
    printf '[{"Config":"config.json","RepoTags":["%s"],"Layers":[%s]}]' "$name" "$layers" >"$work/manifest.json"
    (cd "$work" && tar -cf "$archive.new" -- *)
    mv "$archive.new" "$archive"
    rm -rf "$work"
}
