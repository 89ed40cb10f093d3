// What Python must know of the kernels, by name.

#include <cstring>

#include "exported.h"

namespace {

const struct {
  const char* name;
  int64_t value;
} constants[] = {
    {"lanes", lanes},
    {"sums", sums},
    {"rows_at_once", rows_at_once},
    {"no_tap", no_tap},
    {"plain", plain},
    {"running", running},
    {"batch", batch},
    {"size of Map", sizeof(Map)},
    {"size of Norm", sizeof(Norm)},
    {"size of Entries", sizeof(Entries)},
    {"size of Positions", sizeof(Positions)},
    {"size of Plane", sizeof(Plane)},
};

}  // namespace

extern "C" {

// -1 if there is none of that name.
int64_t constant(const char* name) {
  for (const auto& one : constants)
    if (std::strcmp(one.name, name) == 0) return one.value;
  return -1;
}
EXPORTED(constant)

}  // extern "C"
