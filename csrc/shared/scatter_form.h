// Which of the variants of scatter_apply a call needs. No torch here.
#pragma once

#include <cstdint>

namespace shira {

enum class Element : uint8_t { Float64, Float32, BFloat16, Float16, Other };
enum class Mode : uint8_t { Replace, Interpolate, Add };  // Replace copies bits: only the element size counts

struct ScatterForm {
  Mode mode;
  Element weight;
  Element value;
  uint8_t element_size;  // bytes
  bool wide_index;       // int64 rather than int32
  bool keep;             // whether `saved` is given
};

}  // namespace shira
