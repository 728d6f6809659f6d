// SPDX-License-Identifier: Apache-2.0
// One instruction set: compiled once for each, with TARGET_.. defined and the compiler's flags for it.
//
// No standard containers or algorithms here: a template of theirs compiled for a newer processor could become the copy
// that other targets use.
#include <cstring>

#include "model.h"

#if defined(TARGET_PLAIN)
#define TARGET plain
#elif defined(TARGET_AVX2)
#define TARGET avx2
#elif defined(TARGET_AVX2_SEVEN)
#define TARGET avx2_seven
#elif defined(TARGET_AVXVNNI)
#define TARGET avxvnni
#elif defined(TARGET_AVX512)
#define TARGET avx512
#elif defined(TARGET_AMX)
#define TARGET amx
#elif defined(TARGET_NEON)
#define TARGET neon
#elif defined(TARGET_NEON_DOT)
#define TARGET neon_dot
#elif defined(TARGET_NEON_I8MM)
#define TARGET neon_i8mm
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#elif !defined(TARGET_PLAIN)
#include <immintrin.h>
#endif

namespace ibert {
namespace TARGET {
#if defined(TARGET_PLAIN)
#include "vectors_plain.h"
#elif defined(TARGET_NEON) || defined(TARGET_NEON_DOT) || defined(TARGET_NEON_I8MM)
#include "vectors_neon.h"
#elif defined(TARGET_AVX512) || defined(TARGET_AMX)
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif
using V = Vectors::V;
using S = Vectors;

#include "products.h"

#include "pointwise.h"

#include "matrices.h"

#include "attention.h"

#include "layers.h"
}  // namespace TARGET

#define TARGET_TABLE_(name) target_##name
#define TARGET_TABLE(name) TARGET_TABLE_(name)
#define TARGET_NAME_(name) #name
#define TARGET_NAME(name) TARGET_NAME_(name)

extern const Target TARGET_TABLE(TARGET);
const Target TARGET_TABLE(TARGET) = {
    TARGET_NAME(TARGET),
    sizeof(TARGET::Activation),
#if defined(TARGET_AVX2_SEVEN)
    true,
#else
    false,
#endif
    TARGET::scratch_bytes,
    TARGET::packed_bytes,
    TARGET::pack,
    TARGET::packed_norm_bytes,
    TARGET::pack_norm,
    TARGET::Products::ZERO,
    TARGET::Products::LESS,
    TARGET::layer,
    TARGET::norm16,
    TARGET::read8,
    TARGET::norm8,
    TARGET::sums,
    TARGET::rescaled,
    TARGET::gelu16,
    TARGET::embed_row,
};
}  // namespace ibert
