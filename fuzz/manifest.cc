// runtime/package/manifest.h: any bytes as manifest.json.

#include "fuzz/check_manifest.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  meki::fuzz::check_manifest(meki::fuzz::text_of(data, size));
  return 0;
}
