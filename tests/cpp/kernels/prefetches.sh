#!/bin/sh
# prefetches.sh OBJDUMP OBJECT...: whatever streams the cache or a matrix has prefetch instructions in every object.
# Results do not show when a compiler has dropped them, only a long cache's speed does.
set -eu
objdump=$1
shift
[ $# -gt 0 ] || { echo "prefetches.sh: no object to look at"; exit 1; }
for object in "$@"; do
  "$objdump" -d -C "$object" | awk -v object="$object" '
    BEGIN {
      count = split("scores_int8 values_int8 scores_int4 values_int4 panel", names)
      kinds = split("float short", types)
      for (type = 1; type <= kinds; ++type) {
        names[++count] = "scores_float<.*" types[type] ">"
        names[++count] = "values_float<.*" types[type] ">"
      }
    }
    /^[0-9a-f]+ </ { function_name = $0 }
    /\t(prefetch|prfm)/ { for (i = 1; i <= count; ++i) if (function_name ~ names[i]) found[i] = 1 }
    END {
      for (i = 1; i <= count; ++i) if (!found[i]) { print object ": nothing prefetches in " names[i]; failed = 1 }
      exit failed
    }'
done
