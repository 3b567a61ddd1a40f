// The 16-bit types of a tile: to arithmetic and back. Integer code that vectorises where the target has no instruction.
// Included inside the namespace rule of tile.h: each instruction set compiles its own copy.
#pragma once

#include "tile.h"

namespace entropy_po {
namespace ENTROPY_PO_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

EP_INLINE float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
EP_INLINE uint32_t as_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

template <class T> EP_INLINE T to(float v) { return v; }
template <class T> EP_INLINE T to(double v) { return static_cast<T>(v); }
template <class T> EP_INLINE T to(BFloat16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }
template <class T> EP_INLINE T to(Float16 v) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  // Shift the 15 value bits into place and let one multiply by 2^112 fix the exponent, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fff) << 13;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;  // inf and NaN keep an all-ones exponent
  const uint32_t scaled = as_bits(as_float(magnitude) * 5.192296858534828e33f);
  return as_float((scaled | special) | (static_cast<uint32_t>(v.bits & 0x8000) << 16));
#endif
}

template <class Out> struct Rounded;
template <> struct Rounded<float> {
  static EP_INLINE float from(float v) { return v; }
};
template <> struct Rounded<double> {
  static EP_INLINE double from(double v) { return v; }
};
template <> struct Rounded<BFloat16> {
  static EP_INLINE BFloat16 from(float v) {  // round to nearest even; the quiet bit keeps a NaN from becoming inf
#ifdef __CUDA_ARCH__
    BFloat16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
    return narrow;
#else
    const uint32_t b = as_bits(v);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    const uint32_t nan = (b >> 16) | 0x40u;
    return {static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
#endif
  }
};
template <> struct Rounded<Float16> {
  static EP_INLINE Float16 from(float v) {  // round to nearest even
#ifdef __CUDA_ARCH__
    Float16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
    return narrow;
#else
    const uint32_t b = as_bits(v);
    const uint32_t magnitude = b & 0x7fffffffu;
    // Normal halves: rebias the exponent by -112 and round away 13 bits. Overflow runs into the exponent: inf.
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal halves: adding 0.5 aligns the mantissa so that the FPU rounds at 2^-24.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    uint32_t h = magnitude < (113u << 23) ? subnormal : normal;
    h = magnitude >= (143u << 23) ? 0x7c00u : h;
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return {static_cast<uint16_t>(h | ((b >> 16) & 0x8000u))};
#endif
  }
};

}  // namespace ENTROPY_PO_ISA
}  // namespace entropy_po
