// The code of a sorted list of indices in an adapter file, as docs/format.md has it, in numbers.
#pragma once

#include <cstdint>

namespace shira {

constexpr int64_t kIndexBlock = 4096;  // entries that are decoded together
constexpr int64_t kBorderBytes = 16;   // of the table, for each block but the first
constexpr uint8_t kFirstEscape = 248;  // a gap byte from here on is followed by an escape
constexpr int kEscapeShift = 3;        // an escape counts units of 8
constexpr int kMaxEscapeBytes = 9;     // 7 bits each
constexpr int64_t kMaxNumel = int64_t{1} << 62;

inline int64_t index_blocks(int64_t nnz) { return (nnz + kIndexBlock - 1) / kIndexBlock; }
inline int64_t table_bytes(int64_t nnz) { return nnz ? (index_blocks(nnz) - 1) * kBorderBytes : 0; }

// Little-endian, whatever the machine.
inline int64_t load_int64(const uint8_t* bytes) {
  uint64_t value = 0;
  for (int i = 0; i < 8; ++i) value |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return static_cast<int64_t>(value);
}

inline void store_int64(uint8_t* bytes, int64_t value) {
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(static_cast<uint64_t>(value) >> (8 * i));
}

// A block of coded indices: see docs/format.md.
struct IndexBlock {
  const uint8_t* gaps;
  const uint8_t* escapes;
  const uint8_t* escapes_end;
  int64_t count;
  int64_t before;  // the index before the block's first, or -1
  int64_t last;    // what its last index must be, or -1 where that is open
  int64_t limit;   // all must be below
};

enum class DecodeError : uint8_t { None, EscapesEnd, EscapesLeft, LongEscape, Outside, Border };

}  // namespace shira
