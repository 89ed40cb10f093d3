// What a core can do at most: multiply-adds, and numbers read from each level of memory.

#include "vectors.h"

extern "C" {

// Does 32 multiply-adds of vectors `rounds` times: as many as hide their latency. Returns their
// FLOPs.
double multiply_add(int64_t rounds, Scalar* out) {
  constexpr int64_t many = 16;
  Vec sum[many];
  const Vec a(out[0]), b(out[1]);
  for (auto& v : sum) v = Vec(out[2]);
  for (int64_t i = 0; i < rounds; i++)
    for (int64_t twice = 0; twice < 2; twice++)
      for (auto& v : sum) v = at::vec::fmadd(v, a, b);
  Vec all(Scalar(0));
  for (const auto& v : sum) all = all + v;
  out[3] = total(all);
  return 2. * 2 * many * width * rounds;
}

// Adds up `count` numbers, a multiple of 8 vectors, `rounds` times.
void read_numbers(const Scalar* from, int64_t count, int64_t rounds, Scalar* out) {
  Vec sum[8];
  for (auto& v : sum) v = Vec(Scalar(0));
  for (int64_t round = 0; round < rounds; round++)
    for (int64_t i = 0; i < count; i += 8 * width)
      for (int64_t k = 0; k < 8; k++) sum[k] = sum[k] + Vec::loadu(from + i + k * width);
  Vec all(Scalar(0));
  for (const auto& v : sum) all = all + v;
  out[0] = total(all);
}

}  // extern "C"
