#!/usr/bin/env bash
# Gathers what the C++ example compiles and links against: get_onnxruntime.sh DIR [PYTHON]
#
#   DIR/include   ONNX Runtime's headers, from the header-only package libonnxruntime-dev. Debian has it since release 13; on an older
#                 one it is taken from there, out of the archive that this machine's own apt sources name. Nothing is installed.
#   DIR/lib       links to the library of PYTHON's onnxruntime wheel. It may be newer than the headers: its C interface is versioned.
#
# Where you have a release archive of ONNX Runtime (include/ and lib/), you need none of this: give CMake its directory.
set -euo pipefail

into=$(mkdir -p "$1" && cd "$1" && pwd)
python=$(command -v "${2:-python3}") || { echo "error: no ${2:-python3}: give the interpreter that has onnxruntime" >&2; exit 2; }
newer=trixie # the first Debian release with libonnxruntime-dev
headers=85e733da5cad0e8a2c7bf035279904ae0795c54a3a82a989f6139965b419e528 # of the headers of 1.21.0, one after the other by name

wheel=$("$python" -c 'import importlib.util as i; print(*i.find_spec("onnxruntime").submodule_search_locations)' 2>/dev/null) ||
    { echo "error: $python has no onnxruntime: pip install onnxruntime" >&2; exit 3; }
library=$(find "$wheel/capi" -name 'libonnxruntime.so.*' | head -n 1)
[ -n "$library" ] || { echo "error: $wheel/capi has no libonnxruntime.so: not a wheel for Linux" >&2; exit 3; }
mkdir -p "$into/lib"
for name in libonnxruntime.so libonnxruntime.so.1; do ln -sf "$library" "$into/lib/$name"; done

[ -f "$into/include/onnxruntime_cxx_api.h" ] && exit 0
command -v apt-get >/dev/null || { echo "error: no apt-get: give CMake a release archive of ONNX Runtime instead" >&2; exit 3; }

# The archive of this machine's own Debian release, as apt names it: '<archive>/dists/<codename>/InRelease' ...
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
archive=$(apt-get update --print-uris 2>/dev/null | sed -n "s|^'\(.*\)/dists/$codename/InRelease'.*|\1|p" | head -n 1)
[ -n "$archive" ] || { echo "error: apt knows no archive of Debian: give CMake a release archive of ONNX Runtime instead" >&2; exit 3; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists,cache}/partial "$work/extracted"
printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$archive" "$newer" >"$work/sources.list"
options=(
    -qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User="$(id -un)"
)
cd "$work"
apt-get "${options[@]}" update && apt-get "${options[@]}" download libonnxruntime-dev ||
    { echo "error: apt cannot get libonnxruntime-dev from Debian $newer" >&2; exit 3; }
dpkg -x libonnxruntime-dev_*.deb extracted
found=$(cd extracted/usr/include/onnxruntime && find . -type f | LC_ALL=C sort | xargs cat | sha256sum | cut -d ' ' -f 1)
[ "$found" = "$headers" ] ||
    { echo "error: SHA-256 of the headers in $(echo libonnxruntime-dev_*.deb) is $found, not $headers: look what has changed" >&2; exit 3; }
rm -rf "$into/include"
mv extracted/usr/include/onnxruntime "$into/include"
echo "headers and library of ONNX Runtime are in $into"
