// decode_indices over one block, for one instruction set.
//
//   index[i] = index[i - 1] + 1 + gap[i],   gap = byte, plus 8 times the next escape where byte >= 248
//
// Shapes: gaps, indices [count], at most 4096; the escapes are as many as gap bytes ask for. Blocks are independent:
// each knows the index before it and writes its own part, so there is no race. Integers only, deterministic.
//
// Passes over a block, which stays in the first cache: escapes become numbers, eight at a time where each is one byte;
// gap bytes are summed; then they are widened into the result, escapes are added by a bit mask of 64 entries
// (NOTES.md), and the prefix sum goes from step to index in place. With AVX-512 the last three are one pass over
// vectors of 16. Where the sum shows an index outside the tensor the block is refused; results are numbers, not
// addresses, so that may come after them.
#pragma once

#include "index_code.h"

namespace shira::SHIRA_ISA {

// One escape of any length.
inline DecodeError decode_escape(const uint8_t*& at, const uint8_t* end, uint64_t& value) {
  value = 0;
  for (int bytes = 0;; ++bytes) {
    if (at == end) return DecodeError::EscapesEnd;
    if (bytes == kMaxEscapeBytes) return DecodeError::LongEscape;
    const uint8_t byte = *at++;
    value |= static_cast<uint64_t>(byte & 127) << (7 * bytes);
    if (byte < 128) return byte == 0 && bytes ? DecodeError::LongEscape : DecodeError::None;
  }
}

// What the escapes of a block add to its gaps, and the sum of that: at most the limit, so every number fits a Step.
// There is room for a block's, and 8 more.
template <class Step>
DecodeError decode_escapes(const IndexBlock& block, Step* added, int64_t& number, uint64_t& sum) {
  const uint8_t *at = block.escapes, *const end = block.escapes_end;
  const auto limit = static_cast<uint64_t>(block.limit);
  number = 0;
  sum = 0;
  while (at != end) {
    if (number >= block.count) return DecodeError::EscapesLeft;
    uint64_t value;
    if (end - at >= 8) {
      memcpy(&value, at, 8);
      if ((value & 0x8080808080808080) == 0) {
        for (int j = 0; j < 8; ++j) {
          added[number + j] = static_cast<Step>(at[j]) << kEscapeShift;
          sum += static_cast<uint64_t>(at[j]) << kEscapeShift;
        }
        number += 8;
        at += 8;
        continue;
      }
    }
    if (const DecodeError error = decode_escape(at, end, value); error != DecodeError::None) return error;
    if (value > limit >> kEscapeShift) return DecodeError::Outside;
    value <<= kEscapeShift;
    sum += value;
    if (sum > limit) return DecodeError::Outside;
    added[number++] = static_cast<Step>(value);
  }
  return DecodeError::None;
}

// A bit for each of eight gap bytes that asks for an escape: whose five upper bits are set.
inline uint64_t escaped_of_8(const uint8_t* gaps) {
  uint64_t bytes;
  memcpy(&bytes, gaps, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  bytes = __builtin_bswap64(bytes);
#endif
  const uint64_t clear = ~bytes & 0xf8f8f8f8f8f8f8f8;  // zero bytes are escapes; no byte is 1, so the borrow is exact
  const uint64_t marks = (clear - 0x0101010101010101) & ~clear & 0x8080808080808080;
  return ((marks >> 7) * 0x0102040810204080) >> 56;
}

// Writes the block's indices, modulo the range of Step. Returns how many escapes its gaps ask for; `added` may have
// fewer, but has room for them.
template <class Step>
int64_t write_block(const uint8_t* __restrict gaps, int64_t count, const Step* added, Step before,
                    Step* __restrict steps) {
  int64_t used = 0;
  for (int64_t i = 0; i < count; ++i) steps[i] = static_cast<Step>(gaps[i]) + 1;
  for (int64_t begin = 0; begin < count; begin += 64) {
    uint64_t escaped = 0;
    if (begin + 64 <= count) {
      for (int j = 0; j < 64; j += 8) escaped |= escaped_of_8(gaps + begin + j) << j;
    } else {
      for (int64_t i = begin; i < count; ++i) escaped |= static_cast<uint64_t>(gaps[i] >= kFirstEscape) << (i - begin);
    }
    for (; escaped; escaped &= escaped - 1) steps[begin + __builtin_ctzll(escaped)] += added[used++];
  }
  for (int64_t i = 0; i < count; ++i) {
    before += steps[i];
    steps[i] = before;
  }
  return used;
}

#if SHIRA_VECTOR_BYTES == 64
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own headers, wrongly (its bug 105593)
#endif
inline int64_t write_block(const uint8_t* gaps, int64_t count, const uint32_t* added, uint32_t before,
                           uint32_t* indices) {
  const __m512i zero = _mm512_setzero_si512(), one = _mm512_set1_epi32(1), last = _mm512_set1_epi32(15);
  const __m128i first_escape = _mm_set1_epi8(static_cast<char>(kFirstEscape));
  __m512i at = _mm512_set1_epi32(static_cast<int32_t>(before));  // the index before, in each lane
  int64_t used = 0, i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(gaps + i));
    const __mmask16 escaped = _mm_cmpge_epu8_mask(bytes, first_escape);
    __m512i sums = _mm512_add_epi32(_mm512_cvtepu8_epi32(bytes), one);
    sums = _mm512_add_epi32(sums, _mm512_maskz_expandloadu_epi32(escaped, added + used));
    used += __builtin_popcount(escaped);
    sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, zero, 15));
    sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, zero, 14));
    sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, zero, 12));
    sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, zero, 8));
    sums = _mm512_add_epi32(sums, at);
    _mm512_storeu_si512(indices + i, sums);
    at = _mm512_permutexvar_epi32(last, sums);
  }
  before = static_cast<uint32_t>(_mm512_cvtsi512_si32(at));
  return used + write_block<uint32_t>(gaps + i, count - i, added + used, before, indices + i);
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

template <class Index>
DecodeError decode_block(const IndexBlock& block, Index* indices) {
  using Step = std::make_unsigned_t<Index>;
  Step added[kIndexBlock + 8];
  int64_t number;
  uint64_t sum;
  if (const DecodeError error = decode_escapes(block, added, number, sum); error != DecodeError::None) return error;
  uint32_t plain = 0;
  for (int64_t i = 0; i < block.count; ++i) plain += block.gaps[i];
  // -1 <= before < limit <= 2^62, what escapes add is at most the limit (but for short ones, of 2^22), and so is below
  // 2^63.
  const int64_t last = block.before + static_cast<int64_t>(sum + plain) + block.count;
  if (last >= block.limit) return DecodeError::Outside;
  if (block.last >= 0 && last != block.last) return DecodeError::Border;
  const int64_t used =
      write_block(block.gaps, block.count, added, static_cast<Step>(block.before), reinterpret_cast<Step*>(indices));
  return used > number ? DecodeError::EscapesEnd : used < number ? DecodeError::EscapesLeft : DecodeError::None;
}

inline DecodeError decode_indices(const IndexBlock& block, void* indices, bool wide) {
  return wide ? decode_block(block, static_cast<int64_t*>(indices))
              : decode_block(block, static_cast<int32_t*>(indices));
}

}  // namespace shira::SHIRA_ISA
