// SPDX-License-Identifier: Apache-2.0
// Vectors of eight 16-bit (or four 32-bit) integers with NEON.
#pragma once
#include <arm_neon.h>

#include <cstdint>

struct Vectors {
  static constexpr int W = 8;
  using V = int16x8_t;
  static int32x4_t wide(V a) { return vreinterpretq_s32_s16(a); }
  static uint32x4_t wide_u(V a) { return vreinterpretq_u32_s16(a); }
  static uint16x8_t narrow_u(V a) { return vreinterpretq_u16_s16(a); }
  static V vector(int32x4_t a) { return vreinterpretq_s16_s32(a); }
  static V vector(uint16x8_t a) { return vreinterpretq_s16_u16(a); }

  static V load(const void* p) { return vreinterpretq_s16_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static void store(void* p, V v) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s16(v)); }
  static V set16(int a) { return vdupq_n_s16(static_cast<int16_t>(a)); }
  static V set32(int32_t a) { return vector(vdupq_n_s32(a)); }
  static V zero() { return set16(0); }
  static V and_(V a, V b) { return vandq_s16(a, b); }
  static V add16(V a, V b) { return vaddq_s16(a, b); }
  static V adds16(V a, V b) { return vqaddq_s16(a, b); }
  static V sub16(V a, V b) { return vsubq_s16(a, b); }
  static V min16(V a, V b) { return vminq_s16(a, b); }
  static V max16(V a, V b) { return vmaxq_s16(a, b); }
  static V abs16(V a) { return vabsq_s16(a); }
  static V mul(V a, V b) { return vqrdmulhq_s16(a, b); }
  static V mulhi_u16(V a, V b) {
    const uint32x4_t lo = vmull_u16(vget_low_u16(narrow_u(a)), vget_low_u16(narrow_u(b)));
    return vector(vuzp2q_u16(vreinterpretq_u16_u32(lo), vreinterpretq_u16_u32(vmull_high_u16(narrow_u(a), narrow_u(b)))));
  }
  // Shifts to the right are shifts to the left by less than nothing; by more than the width they leave 0, or the sign.
  static V sll16(V a, int n) { return vshlq_s16(a, set16(n)); }
  static V srl16(V a, int n) { return vector(vshlq_u16(narrow_u(a), set16(-n))); }
  static V shifted256(V z) { return vector(vshlq_u16(vdupq_n_u16(256), vnegq_s16(z))); }
  static V add32(V a, V b) { return vector(vaddq_s32(wide(a), wide(b))); }
  static V sub32(V a, V b) { return vector(vsubq_s32(wide(a), wide(b))); }
  static V min32(V a, V b) { return vector(vminq_s32(wide(a), wide(b))); }
  static V max32(V a, V b) { return vector(vmaxq_s32(wide(a), wide(b))); }
  static V minu32(V a, V b) { return vreinterpretq_s16_u32(vminq_u32(wide_u(a), wide_u(b))); }
  static V sra32(V a, int n) { return vector(vshlq_s32(wide(a), vdupq_n_s32(-n))); }
  static V sll32(V a, int n) { return vector(vshlq_s32(wide(a), vdupq_n_s32(n))); }
  static V srav32(V a, V n) { return vector(vshlq_s32(wide(a), vnegq_s32(wide(n)))); }
  static V sllv32(V a, V n) { return vector(vshlq_s32(wide(a), wide(n))); }
  static V packs32(V a, V b) { return vcombine_s16(vqmovn_s32(wide(a)), vqmovn_s32(wide(b))); }
  static V packus32(V a, V b) { return vector(vcombine_u16(vqmovun_s32(wide(a)), vqmovun_s32(wide(b)))); }
  static V unpack_lo(V a, V b) { return vzip1q_s16(a, b); }
  static V unpack_hi(V a, V b) { return vzip2q_s16(a, b); }
  static V madd(V a, V b) {
    return vector(vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
  }
  static void store8(void* p, V v) { vst1_s8(static_cast<int8_t*>(p), vmovn_s16(v)); }
  static V load_s8(const int8_t* p) { return vmovl_s8(vld1_s8(p)); }
  static int32_t largest32(V v) { return vmaxvq_s32(wide(v)); }
  static int64_t sum32(V v) { return vaddlvq_s32(wide(v)); }
  struct Sum64 {
    uint64x2_t total = vdupq_n_u64(0);
    void add(V v) { total = vpadalq_u32(total, wide_u(v)); }
    int64_t value() const { return int64_t(vaddvq_u64(total)); }
  };
};
