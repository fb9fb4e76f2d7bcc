// decode_indices over one block, for one instruction set.
//
//   index[i] = index[i - 1] + 1 + gap[i],   gap = byte, plus 8 times the next escape where byte >= 248
//
// Shapes: gaps, indices [count], at most 4096; the escapes are as many as gap bytes ask for. Blocks are independent:
// each knows the index before it and writes its own part, so there is no race. Integers only, deterministic.
//
// Passes over a block, which stays in the first cache: escapes become numbers, eight at a time where each is one byte;
// gap bytes are widened into the result and summed (vectorised); escapes are added by a bit mask of 64 entries, whose
// loop is predicted far better than a question at each entry (at 1 %: 1.9 times as fast); and the prefix sum goes from
// step to index in place. Before that pass the sum is known, in 64 bits: no index outside the tensor is ever computed.
#pragma once

#include "index_code.h"
#include "kernels.h"

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

template <class Index>
DecodeError decode_block(const IndexBlock& block, Index* indices) {
  using Step = std::make_unsigned_t<Index>;
  Step added[kIndexBlock + 8];
  int64_t number, used = 0;
  uint64_t sum;
  if (const DecodeError error = decode_escapes(block, added, number, sum); error != DecodeError::None) return error;

  Step* __restrict steps = reinterpret_cast<Step*>(indices);
  const uint8_t* __restrict gaps = block.gaps;
  uint32_t plain = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    steps[i] = static_cast<Step>(gaps[i]) + 1;
    plain += gaps[i];
  }
  for (int64_t begin = 0; begin < block.count; begin += 64) {
    uint64_t escaped = 0;
    if (begin + 64 <= block.count) {
      for (int j = 0; j < 64; j += 8) escaped |= escaped_of_8(gaps + begin + j) << j;
    } else {
      for (int64_t i = begin; i < block.count; ++i)
        escaped |= static_cast<uint64_t>(gaps[i] >= kFirstEscape) << (i - begin);
    }
    if (used + __builtin_popcountll(escaped) > number) return DecodeError::EscapesEnd;
    for (; escaped; escaped &= escaped - 1) steps[begin + __builtin_ctzll(escaped)] += added[used++];
  }
  if (used != number) return DecodeError::EscapesLeft;

  // -1 <= before < limit <= 2^62, what escapes add is at most the limit (but for short ones, of 2^22), and so is below
  // 2^63.
  const int64_t last = block.before + static_cast<int64_t>(sum + plain) + block.count;
  if (last >= block.limit) return DecodeError::Outside;
  if (block.last >= 0 && last != block.last) return DecodeError::Border;
  Step at = static_cast<Step>(block.before);
  for (int64_t i = 0; i < block.count; ++i) {
    at += steps[i];
    steps[i] = at;
  }
  return DecodeError::None;
}

inline DecodeError decode_indices(const IndexBlock& block, void* indices, bool wide) {
  return wide ? decode_block(block, static_cast<int64_t*>(indices))
              : decode_block(block, static_cast<int32_t*>(indices));
}

}  // namespace shira::SHIRA_ISA
