#!/bin/sh
# symbols.sh NM OBJECT...: no object defines a symbol that the linker may replace by another object's (weak or unique).
# The objects are compiled with instructions that not every CPU runs: of an inline function that one of them shares with
# a file of the baseline, the linker could keep the copy that only a newer CPU can run.
set -eu
nm=$1
shift
[ $# -gt 0 ] || { echo "symbols.sh: no object to look at"; exit 1; }
failed=0
for object in "$@"; do
  symbols=$("$nm" --defined-only --extern-only --format=posix "$object")
  [ -n "$symbols" ] || { echo "$object: defines no symbol at all, expected at least one"; failed=1; }
  shared=$(echo "$symbols" | awk '$2 ~ /^[WwVvu]$/ { print $1 }' | c++filt)
  [ -z "$shared" ] && continue
  echo "$object: the linker may merge these with copies of other files:"
  echo "$shared" | sed 's/^/  /'
  echo "Put them into an anonymous namespace, or do not use them there (runtime/kernels/simd/common.h)."
  failed=1
done
exit $failed
