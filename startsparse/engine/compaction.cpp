// Lists of entries without those whose value is zero.

#include "maps.h"

#include <numeric>

extern "C" {

// List l has the entries from first[l] to first[l + 1]; entry e is at offset[e] and has the value
// value[order[e]]. Fills the same of the entries that are left, where value_left[e] is the value of
// entry e. Each list is done by one thread.
void compact(const int32_t* first, const int32_t* offset, const int32_t* order, const Scalar* value,
             int64_t lists, int32_t* first_left, int32_t* offset_left, int32_t* order_left,
             Scalar* value_left) {
  first_left[0] = 0;
  at::parallel_for(0, lists, 64, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; list++) {
      int32_t count = 0;
      for (int32_t e = first[list]; e < first[list + 1]; e++) count += value[order[e]] != 0;
      first_left[list + 1] = count;
    }
  });
  std::partial_sum(first_left, first_left + lists + 1, first_left);
  at::parallel_for(0, lists, 64, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; list++) {
      int32_t to = first_left[list];
      // Without a branch: what was written last stays only if its value is not zero.
      for (int32_t e = first[list]; to < first_left[list + 1]; e++) {
        const Scalar v = value[order[e]];
        offset_left[to] = offset[e], order_left[to] = order[e], value_left[to] = v;
        to += v != 0;
      }
    }
  });
}

}  // extern "C"
