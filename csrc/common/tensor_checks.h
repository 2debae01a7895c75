// Checks of arguments. Each failure is one sentence: op, argument, what is needed, what came.
#pragma once

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/draw_options.h"
#include "common/torch_stable.h"

namespace dmax {

// STD_TORCH_CHECK puts function, file and line before the message, which do not help with a
// caller's mistake; our message is the sentence alone. Python sees a RuntimeError either way.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define DMAX_CHECK(condition, ...)           \
  do {                                       \
    if (__builtin_expect(!(condition), 0)) { \
      ::dmax::fail(__VA_ARGS__);             \
    }                                        \
  } while (false)

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

template <class Dims>
std::string shape_text(const Dims& sizes) {
  std::ostringstream text;
  text << '[';
  const char* separator = "";
  for (int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << ']';
  return text.str();
}

inline bool is_float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  DMAX_CHECK(is_float_dtype(t.scalar_type()), op, ": ", name,
             " must be float32, bfloat16 or float16, got ", dtype_name(t.scalar_type()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType need) {
  DMAX_CHECK(t.scalar_type() == need, op, ": ", name, " must be ", dtype_name(need), ", got ",
             dtype_name(t.scalar_type()));
}

inline void check_integer(const char* op, const char* name, const Tensor& t) {
  DMAX_CHECK(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, op, ": ",
             name, " must be int64 or int32, got ", dtype_name(t.scalar_type()));
}

template <class Dims>
void check_shape(const char* op, const char* name, const Tensor& t, const Dims& need,
                 const char* meaning) {
  bool same = t.dim() == static_cast<int64_t>(need.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == need[i];
  DMAX_CHECK(same, op, ": ", name, " must have shape ", shape_text(need), " (", meaning, "), got ",
             shape_text(t.sizes()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t,
                              const char* like_name, const Tensor& like) {
  DMAX_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op,
             ": ", name, " must be on the same device as ", like_name, ", got ",
             t.is_cuda() ? "cuda:" : "cpu:", t.get_device_index(), " and ",
             like.is_cuda() ? "cuda:" : "cpu:", like.get_device_index());
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  DMAX_CHECK(t.is_contiguous(), op, ": ", name,
             " is written in place and must be contiguous, got strides ", shape_text(t.strides()),
             " for shape ", shape_text(t.sizes()));
}

// GPU kernels count ids within a row in int32; the margin keeps the last tile's end in range
inline void check_vocab(const char* op, const Tensor& t, int64_t vocab) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 8192;
  DMAX_CHECK(!t.is_cuda() || vocab <= kMost, op, ": V must be at most ", kMost, " on CUDA, got ",
             vocab);
}

// Logits [..., V] with V >= 1; returns V
inline int64_t check_logits(const char* op, const char* name, const Tensor& logits) {
  check_float(op, name, logits);
  DMAX_CHECK(logits.dim() >= 1, op, ": ", name, " must be [..., V], got a 0-D tensor");
  const int64_t vocab = logits.size(logits.dim() - 1);
  DMAX_CHECK(vocab >= 1, op, ": ", name, " must be [..., V] with V >= 1, got ",
             shape_text(logits.sizes()));
  check_vocab(op, logits, vocab);
  return vocab;
}

// `where` ends the message: which row has this temperature, nothing for the op's own
inline void check_temperature(const char* op, double temperature, const std::string& where = {}) {
  DMAX_CHECK(is_temperature(temperature), op,
             ": temperature must be at least 1e-30 and at most 1e30, got ", temperature, where);
}

// A token id, or -1 for none
inline void check_suppress_token(const char* op, int64_t suppress_token, int64_t vocab) {
  DMAX_CHECK(suppress_token >= -1 && suppress_token < vocab, op,
             ": suppress_token must be -1 (none) or a token id below ", vocab, ", got ",
             suppress_token);
}

inline void check_mask_token_id(const char* op, int64_t mask_token_id, int64_t vocab) {
  DMAX_CHECK(mask_token_id >= 0 && mask_token_id < vocab, op,
             ": mask_token_id must be a token id in [0, ", vocab, "), got ", mask_token_id);
}

// Thresholds are probabilities, but values below 0 ("always") and above 1 ("never") are allowed
inline void check_threshold(const char* op, const char* name, double threshold) {
  DMAX_CHECK(!std::isnan(threshold), op, ": ", name, " must be a number, got NaN");
}

}  // namespace dmax
