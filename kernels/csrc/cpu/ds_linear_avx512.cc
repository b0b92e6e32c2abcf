// Integer weights with AVX-512 F, BW, VL, DQ, where a multiply-add of pairs is two instructions.
#include <immintrin.h>

#include <cstring>

#include "../ds_linear.h"

namespace dsformer {
namespace {

#include "vec_avx512.inc"
#include "int_avx512.inc"

Int multiply_add(Int sum, Int a, Int b) {
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
  asm volatile("" : "+v"(sum));  // or GCC 12 multiplies first and adds later, and has too few registers for that
  return sum;
}

#include "ds_linear_integers.inc"

}  // namespace

extern const DsLinearTier ds_linear_avx512 = {
    kGroup, kMinTileTokens, kMostGroups * kGroup, kStepRows, kIntegersShare, sizeof(int16_t), tile_floats, suits,
    &ds_linear_floats_avx512, nullptr, kLanes, prepare, dense, sparse, normalize};

}  // namespace dsformer
