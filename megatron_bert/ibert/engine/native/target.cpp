// SPDX-License-Identifier: Apache-2.0
// One instruction set: compiled once for each, with TARGET (its name) and TARGET_.. (the same in capitals) defined, and the
// compiler's flags for it.
//
// No standard containers or algorithms here: a template of theirs compiled for a newer processor could become the copy
// that other targets use.
#include <cstring>

#include "model.h"

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

#define QUOTED_(name) #name
#define QUOTED(name) QUOTED_(name)

extern const Target table;
const Target table = {
    QUOTED(TARGET),
    sizeof(Activation) * Products::ROOM,
    scratch_bytes,
    packed_bytes,
    pack,
    packed_norm_bytes,
    pack_norm,
    Products::ZERO,
    Products::LESS,
    layer,
    norm16,
    read8,
    norm8,
    sums,
    rescaled,
    gelu16,
    embed_row,
};
}  // namespace TARGET
}  // namespace ibert
