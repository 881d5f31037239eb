// How weights are read: 64 columns of a row as unsigned bytes w + offset, four rows interleaved.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "linear.h"

KERNELS_BEGIN
namespace vlm_edge {

struct Int8Weights {
  static constexpr int kOffset = 128;
  static size_t bytes(size_t columns) { return columns; }

  // `mask` has a bit for each column that exists.
  static ALWAYS_INLINE __m512i row(const uint8_t* w) {
    return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(char(0x80)));
  }
  static ALWAYS_INLINE __m512i row(const uint8_t* w, __mmask64 mask) {
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w), _mm512_set1_epi8(char(0x80)));
  }
};

struct Int4Weights {
  static constexpr int kOffset = 8;
  static size_t bytes(size_t columns) { return columns / 2; }

  static ALWAYS_INLINE __m512i row(const uint8_t* w) {
    return spread(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  }
  static ALWAYS_INLINE __m512i row(const uint8_t* w, __mmask64 mask) {
    return spread(_mm256_maskz_loadu_epi8(__mmask32(_pext_u64(mask, 0x5555555555555555)), w));
  }

 private:
  // Each byte becomes two: its low nibble, then its high nibble, each xor 8.
  static ALWAYS_INLINE __m512i spread(__m256i bytes) {
    __m512i wide = _mm512_cvtepu8_epi16(bytes);
    __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
    const __m512i low = _mm512_set1_epi8(0x0f), sign = _mm512_set1_epi8(0x08);
    return _mm512_xor_si512(_mm512_and_si512(both, low), sign);
  }
};

ALWAYS_INLINE __mmask64 columns_mask(size_t columns) {
  return columns >= kColumns ? ~0ull : (1ull << columns) - 1;
}

// Four rows of 64 bytes to four vectors of [column][row]. 32-bit lane 4 L + j of vector i is column
// 16 L + 4 i + j: the order in which the unpack instructions leave them.
ALWAYS_INLINE void interleave(__m512i r0, __m512i r1, __m512i r2, __m512i r3, __m512i out[4]) {
  __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
  __m512i c = _mm512_unpacklo_epi8(r2, r3), d = _mm512_unpackhi_epi8(r2, r3);
  out[0] = _mm512_unpacklo_epi16(a, c);
  out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d);
  out[3] = _mm512_unpackhi_epi16(b, d);
}

// From that order to columns 0..15, 16..31, 32..47, 48..63: a 4 x 4 transposition of 128-bit lanes.
ALWAYS_INLINE void in_order(__m512i v[4]) {
  __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
  __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

}  // namespace vlm_edge
KERNELS_END
