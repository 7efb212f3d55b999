// A few rows times a matrix in fp32 or bf16, read once. row_linear.py builds this page and explains it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "experts.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// Sums in fp32 that grow side by side. A register of AVX-512 has 16 lanes, but with so many GCC's code for
// several rows took half as long again.
#ifdef __AVX2__
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int INPUTS = 32;    // a row of the weight has a multiple of these
constexpr int OUTPUTS = 16;   // rows of the weight that stay in the core's cache for all rows of x
constexpr int SHARED = 8;     // rows of x that share each weight that is loaded
constexpr int AHEAD = 16384;  // bytes: how far in front of the sums a weight is asked for

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

template <typename Vector>
inline __attribute__((always_inline)) void load(Vector& vector, const void* at) {
  std::memcpy(&vector, at, sizeof vector);
}

// Asks for a weight that comes later, to be put into the second cache (2): the first holds the rows of x, and
// a core can wait for few requests to it at a time. With a row or two, loads follow each other so fast that a
// core looks ahead by itself, and asking too costs time.
template <int ROWS>
inline __attribute__((always_inline)) void ask_ahead(const void* at) {
  if constexpr (ROWS > 2) __builtin_prefetch(static_cast<const char*>(at) + AHEAD, 0, 2);
}

// For some outputs and rows of x, with what every CPU has: out[m][n] = sum over k of w[n][k] x[m][k].
template <typename T, int ROWS>
void plain_loop(const T* w, const float* x, int64_t K, int num_outputs, float (*out)[OUTPUTS]) {
  for (int n = 0; n < num_outputs; n++, w += K) {
    Floats sums[ROWS] = {}, first, second;
    for (int64_t k = 0; k < K; k += 4 * LANES / sizeof(T)) {
      ask_ahead<ROWS>(w + k);
      if constexpr (sizeof(T) == 4) {
        Floats weights;
        load(weights, w + k);
        for (int m = 0; m < ROWS; m++) {
          load(first, x + m * K + k);
          sums[m] += weights * first;
        }
      } else {
        // A bf16 is the upper half of the fp32 of the same value. Here a lane holds two of them; what is
        // below the upper one is cut off.
        Words pairs;
        load(pairs, w + k);
        const Floats even = reinterpret_cast<Floats>(pairs << 16);
        const Floats odd = reinterpret_cast<Floats>(pairs & 0xffff0000);
        for (int m = 0; m < ROWS; m++) {
          load(first, x + m * K + k);
          load(second, x + m * K + k + LANES);
          sums[m] += even * first + odd * second;
        }
      }
    }
    for (int m = 0; m < ROWS; m++) {
      float parts[LANES];
      std::memcpy(parts, &sums[m], sizeof parts);
      for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
      out[m][n] = parts[0];
    }
  }
}

// bf16 inputs as the plain loop reads them, in fp32: of 2 * LANES first the even ones, then the odd ones.
void spread(const at::BFloat16* x, float* to, int64_t count) {
  for (int64_t k = 0; k < count; k += 2 * LANES)
    for (int i = 0; i < LANES; i++) {
      to[k + i] = x[k + 2 * i];
      to[k + LANES + i] = x[k + 2 * i + 1];
    }
}

#ifdef __AVX512BF16__
// The same with an instruction that takes pairs of bf16 as they are: each lane gains two products at once
// (and takes numbers below 1e-38 for 0).
template <int ROWS>
void dot_loop(const at::BFloat16* w, const at::BFloat16* x, int64_t K, int num_outputs,
                  float (*out)[OUTPUTS]) {
  for (int n = 0; n < num_outputs; n++, w += K) {
    __m512 sums[ROWS] = {};
    for (int64_t k = 0; k < K; k += INPUTS) {
      ask_ahead<ROWS>(w + k);
      const __m512bh weights = (__m512bh)_mm512_loadu_si512(w + k);
      for (int m = 0; m < ROWS; m++)
        sums[m] = _mm512_dpbf16_ps(sums[m], weights, (__m512bh)_mm512_loadu_si512(x + m * K + k));
    }
    for (int m = 0; m < ROWS; m++) out[m][n] = _mm512_reduce_add_ps(sums[m]);
  }
}
bool has_dot_loop() { return true; }
#else
template <int ROWS>
void dot_loop(const at::BFloat16*, const at::BFloat16*, int64_t, int, float (*)[OUTPUTS]) {}
bool has_dot_loop() { return false; }
#endif

// The number of rows is a constant of the loops, so that the sums stay in registers, where there are enough.
template <typename T, int ROWS = SHARED>
void some_rows(int rows, const T* w, const T* x, const float* plain_x, int64_t K, int num_outputs,
               float (*out)[OUTPUTS]) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return some_rows<T, ROWS - 1>(rows, w, x, plain_x, K, num_outputs, out);
  if (plain_x) return plain_loop<T, ROWS>(w, plain_x, K, num_outputs, out);
  if constexpr (sizeof(T) == 2) dot_loop<ROWS>(w, x, K, num_outputs, out);
}

// x (M, K) in the order of the runs, of which row n is row order[n] of out (M, N); weight
// (E, N, K), bias (E, N)
template <typename T, typename Out>
void multiply(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& out,
              const std::vector<Run>& runs, const std::vector<int64_t>& order, bool plain) {
  const int64_t num_rows = x.size(0), K = x.size(1), num_outputs = weight.size(1);
  const T* inputs = x.const_data_ptr<T>();
  const T* weights = weight.const_data_ptr<T>();
  const float* biases = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  Out* outputs = out.mutable_data_ptr<Out>();
  const float* plain_inputs = nullptr;
  std::vector<float> spread_inputs;
  if constexpr (sizeof(T) == 4) {
    plain_inputs = inputs;
  } else if (plain) {
    spread_inputs.resize(num_rows * K);
    spread(inputs, spread_inputs.data(), num_rows * K);
    plain_inputs = spread_inputs.data();
  }

  // Each core gets outputs that follow each other, and so reads one piece of memory from start to end.
  const int64_t num_blocks = (num_outputs + OUTPUTS - 1) / OUTPUTS;
  at::parallel_for(0, runs.size() * num_blocks, 1, [&](int64_t begin, int64_t end) {
    float sums[SHARED][OUTPUTS];
    for (int64_t block = begin; block < end; block++) {
      const auto [matrix, first, in_run] = runs[block / num_blocks];
      const int64_t n = block % num_blocks * OUTPUTS;
      const int count = std::min<int64_t>(OUTPUTS, num_outputs - n);
      const T* w = weights + matrix * weight.stride(0) + n * K;
      for (int64_t row = first; row < first + in_run; row += SHARED) {
        const int rows = std::min<int64_t>(SHARED, first + in_run - row);
        const float* plain_rows = plain_inputs ? plain_inputs + row * K : nullptr;
        some_rows<T>(rows, w, inputs + row * K, plain_rows, K, count, sums);
        for (int m = 0; m < rows; m++) {
          Out* to = outputs + order[row + m] * num_outputs + n;
          for (int i = 0; i < count; i++)
            to[i] = sums[m][i] + (biases ? biases[matrix * num_outputs + n + i] : 0);
        }
      }
    }
  });
}

// x (..., K), weight (N, K), bias (N), all fp32 or all bf16 -> (..., N), in the dtype of x or in fp32.
// With experts (M): row m of x (M, K) goes through matrix experts[m] of weight (E, N, K), bias (E, N).
at::Tensor row_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      bool plain, bool to_fp32, const std::optional<at::Tensor>& experts) {
  const int64_t K = weight.size(-1), num_outputs = weight.size(-2);
  TORCH_CHECK(x.size(-1) == K, "x has ", x.size(-1), " inputs, not ", K);
  TORCH_CHECK(K % INPUTS == 0, K, " inputs are no multiple of ", INPUTS);
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && weight.dim() == (experts ? 3 : 2) &&
                  weight.stride(-1) == 1 && weight.stride(-2) == K,
              "x and weight do not fit");
  const at::Tensor inputs = x.reshape({-1, K}).contiguous();
  const auto [order, runs] = sort_by_expert(inputs.size(0), experts, weight.size(0));
  const at::Tensor rows = experts ? inputs.index_select(0, at::tensor(order)) : inputs;
  const at::Tensor matrices = experts ? weight : weight.unsqueeze(0);
  const at::TensorOptions options = to_fp32 ? x.options().dtype(at::kFloat) : x.options();
  at::Tensor out = at::empty({rows.size(0), num_outputs}, options);
  const at::Tensor biases = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  TORCH_CHECK(!bias || bias->numel() == matrices.size(0) * num_outputs, "the bias does not fit");
  if (x.scalar_type() == at::kFloat)
    multiply<float, float>(rows, matrices, biases, out, runs, order, true);
  else if (to_fp32)
    multiply<at::BFloat16, float>(rows, matrices, biases, out, runs, order, plain || !has_dot_loop());
  else
    multiply<at::BFloat16, at::BFloat16>(rows, matrices, biases, out, runs, order, plain || !has_dot_loop());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = num_outputs;
  return out.view(shape);
}

// Whether each loop gives sums that are known: of whole numbers, which every dtype holds and no order of
// additions changes.
template <typename T>
bool gives_known_sums(bool plain) {
  constexpr int K = 3 * INPUTS;
  T x[SHARED * K], w[OUTPUTS * K];
  float plain_x[SHARED * K], sums[SHARED][OUTPUTS];
  for (int i = 0; i < SHARED * K; i++) x[i] = i * 7 % 23 - 11;
  for (int i = 0; i < OUTPUTS * K; i++) w[i] = i * 5 % 19 - 9;
  if constexpr (sizeof(T) == 2)
    spread(x, plain_x, SHARED * K);
  else
    std::copy_n(x, SHARED * K, plain_x);
  for (int rows = 1; rows <= SHARED; rows++) {
    some_rows<T>(rows, w, x, plain ? plain_x : nullptr, K, OUTPUTS, sums);
    for (int m = 0; m < rows; m++)
      for (int n = 0; n < OUTPUTS; n++) {
        int known = 0;
        for (int k = 0; k < K; k++) known += ((m * K + k) * 7 % 23 - 11) * ((n * K + k) * 5 % 19 - 9);
        if (sums[m][n] != known) return false;
      }
  }
  return true;
}

bool works() {
  return gives_known_sums<float>(true) && gives_known_sums<at::BFloat16>(true) &&
         (!has_dot_loop() || gives_known_sums<at::BFloat16>(false));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zoo, library) {
  library.def(
      "row_linear(Tensor x, Tensor weight, Tensor? bias=None, bool plain=False, bool to_fp32=False, "
      "Tensor? experts=None) -> Tensor");
  library.def("has_dot_loop() -> bool", has_dot_loop);
  library.def("row_linear_works() -> bool", works);
}
TORCH_LIBRARY_IMPL(zoo, CPU, library) { library.impl("row_linear", row_linear); }
