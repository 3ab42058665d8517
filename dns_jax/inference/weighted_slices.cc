// The kernel of dns_jax.native: sums of weighted slices, the work of a sparse layer.
//
// outputs[f, r, :] = biases[f] + Σ_k values[k] · inputs[offset(k, r) : offset(k, r) + length]
// over the k from starts[f] up to starts[f + 1], with offset(k, r) = (positions[k] + r · stride) ·
// batch and length = width · batch.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Taps {
  const int32_t* positions;
  const float* values;
  int64_t count;
};

// Computes kVectors · kLanes neighbouring outputs. Their sums stay in registers: vectors are
// spelled out, as compilers leave an array of floats in memory.
template <int kLanes, int kVectors>
void SumTile(const float* inputs, const Taps& taps, int64_t batch, float bias, float* outputs) {
  using Vector [[gnu::vector_size(4 * kLanes)]] = float;
  Vector sums[kVectors];
  for (int i = 0; i < kVectors; ++i) sums[i] = bias - Vector{};
  for (int64_t k = 0; k < taps.count; ++k) {
    const float* source = inputs + taps.positions[k] * batch;
    for (int i = 0; i < kVectors; ++i) {
      Vector piece;
      std::memcpy(&piece, source + i * kLanes, sizeof(piece));  // may lie anywhere
      sums[i] += taps.values[k] * piece;
    }
  }
  std::memcpy(outputs, sums, sizeof(sums));
}

float SumOne(const float* inputs, const Taps& taps, int64_t batch, float bias) {
  float sum = bias;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < taps.count; ++k) {
    sum += taps.values[k] * inputs[taps.positions[k] * batch];
  }
  return sum;
}

ffi::Error WeightedSlicesImpl(
    ffi::Buffer<ffi::F32> inputs, ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> positions,
    ffi::Buffer<ffi::F32> values, ffi::Buffer<ffi::F32> biases,
    ffi::ResultBuffer<ffi::F32> outputs, int64_t batch, int64_t rows, int64_t stride,
    int64_t width) {
  const int32_t* start = starts.typed_data();
  const int64_t length = width * batch;
  float* output = outputs->typed_data();
  for (size_t f = 0; f < biases.element_count(); ++f) {
    const Taps taps{positions.typed_data() + start[f], values.typed_data() + start[f],
                    start[f + 1] - start[f]};
    const float bias = biases.typed_data()[f];
    for (int64_t r = 0; r < rows; ++r, output += length) {
      const float* input = inputs.typed_data() + r * stride * batch;
      int64_t i = 0;
      for (; i + 64 <= length; i += 64) SumTile<16, 4>(input + i, taps, batch, bias, output + i);
      for (; i + 16 <= length; i += 16) SumTile<16, 1>(input + i, taps, batch, bias, output + i);
      for (; i + 8 <= length; i += 8) SumTile<8, 1>(input + i, taps, batch, bias, output + i);
      for (; i < length; ++i) output[i] = SumOne(input + i, taps, batch, bias);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(WeightedSlices, WeightedSlicesImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("batch")
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("width"));
