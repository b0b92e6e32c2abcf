// Integer weights with AVX-512 VNNI, where a multiply-add of pairs is one instruction.
#include <immintrin.h>

#include <cstring>

#include "../ds_linear.h"

namespace dsformer {
namespace {

#include "vec_avx512.inc"
#include "int_avx512.inc"

Int multiply_add(Int sum, Int a, Int b) { return _mm512_dpwssd_epi32(sum, a, b); }

#include "ds_linear_integers.inc"

}  // namespace

extern const DsLinearTier ds_linear_avx512vnni = {
    kGroup, kMinTileTokens, kMostGroups * kGroup, kStepRows, kIntegersShare, sizeof(int16_t), tile_floats, suits,
    &ds_linear_floats_avx512, nullptr, kLanes, prepare, dense, sparse, normalize};

}  // namespace dsformer
