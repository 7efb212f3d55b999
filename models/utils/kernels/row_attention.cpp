// Attention of a few queries over a cache. row_attention.py builds this page and explains it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

// How many numbers in fp32 a register of this CPU holds, which are handled side by side.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int FEATURES = 16;    // a head has a multiple of these, whatever the CPU
constexpr int MAX_QUERIES = 8;  // of a head
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t BFloats __attribute__((vector_size(2 * LANES)));

INLINE void load(Floats& vector, const float* at) { std::memcpy(&vector, at, sizeof vector); }
INLINE void load(Floats& vector, const at::BFloat16* at) {
  BFloats bits;  // a bf16 is the upper half of the fp32 of the same value
  std::memcpy(&bits, at, sizeof bits);
  vector = reinterpret_cast<Floats>(__builtin_convertvector(bits, Ints) << 16);
}

// 16 numbers become 8, 4, 2 and 1: the upper half is added to the lower. Floats is one of the three.
INLINE float sum(const Four& four) { return (four[0] + four[2]) + (four[1] + four[3]); }
INLINE float sum(const Eight& eight) {
  Four halves[2];
  std::memcpy(halves, &eight, sizeof halves);
  return sum(halves[0] + halves[1]);
}
INLINE float sum(const Sixteen& sixteen) {
  Eight halves[2];
  std::memcpy(halves, &sixteen, sizeof halves);
  return sum(halves[0] + halves[1]);
}

// e^x for x <= 0, in place: 2^n e^r, with n whole and r at most ln(2) / 2 in size, where the terms up to
// r^6 / 6! are enough. Below e^-87, the smallest number with all digits, it stays that: nothing beside 1.
INLINE void exponential(Floats& x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // cut off: x / ln(2), rounded
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln(2) in two parts, the first exact
  const Floats series =
      1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
  x = reinterpret_cast<Floats>(reinterpret_cast<Ints>(series) + (n << 23));  // its exponent grows by n
}

// Where the slots of one row's head lie: in pieces of `size` slots, each at an offset of its own. What comes
// next cannot be foreseen by the processor, and so is asked for while a piece is read.
struct Slots {
  int64_t size;
  std::vector<int64_t> offsets;

  template <typename T>
  const T* piece(const T* memory, size_t n, int64_t d) const {
    if (n + 1 < offsets.size())
      for (int64_t i = 0; i < size * d; i += 64 / sizeof(T)) __builtin_prefetch(memory + offsets[n + 1] + i);
    return memory + offsets[n];
  }
};

// One head of some queries: out[m] = sum over s of p[m][s] v[s], with p[m] = softmax of q[m] . k[s] over s.
template <typename T, int ROWS>
void head(const float* q, const T* k, const T* v, const bool* mask, int64_t S, int64_t num_slots,
          const Slots& slots, int64_t d, float* p, T* out) {
  const int64_t width = (num_slots + LANES - 1) / LANES * LANES;  // of a row of p
  float totals[ROWS];

  for (size_t n = 0; n < slots.offsets.size(); n++) {
    const T* piece = slots.piece(k, n, d);
    const int64_t start = n * slots.size, end = std::min(start + slots.size, num_slots);
    for (int64_t s = start; s < end; s++, piece += d) {
      Floats sums[ROWS] = {}, keys, query;
      for (int64_t i = 0; i < d; i += LANES) {
        load(keys, piece + i);
        for (int m = 0; m < ROWS; m++) {
          load(query, q + m * d + i);
          sums[m] += keys * query;
        }
      }
      for (int m = 0; m < ROWS; m++) p[m * width + s] = mask[m * S + s] ? sum(sums[m]) : NOTHING;
    }
  }
  for (int m = 0; m < ROWS; m++) std::fill(p + m * width + num_slots, p + (m + 1) * width, NOTHING);

  for (int m = 0; m < ROWS; m++) {
    float* row = p + m * width;
    const float largest = *std::max_element(row, row + width);
    Floats total = {}, x;
    for (int64_t s = 0; s < width; s += LANES) {
      load(x, row + s);
      x -= largest;
      exponential(x);
      total += x;
      std::memcpy(row + s, &x, sizeof x);
    }
    totals[m] = sum(total);
  }

  for (int64_t i = 0; i < d; i += LANES) {
    Floats sums[ROWS] = {}, values;
    for (size_t n = 0; n < slots.offsets.size(); n++) {
      const T* piece = (i ? v + slots.offsets[n] : slots.piece(v, n, d)) + i;
      const int64_t start = n * slots.size, end = std::min(start + slots.size, num_slots);
      for (int64_t s = start; s < end; s++, piece += d) {
        load(values, piece);
        for (int m = 0; m < ROWS; m++) sums[m] += p[m * width + s] * values;
      }
    }
    for (int m = 0; m < ROWS; m++)
      for (int lane = 0; lane < LANES; lane++) out[m * d + i + lane] = sums[m][lane] / totals[m];
  }
}

// The number of queries is a constant of the loops, so that sums stay in registers if there are enough.
template <typename T, int ROWS = MAX_QUERIES>
void some_queries(int64_t rows, const float* q, const T* k, const T* v, const bool* mask, int64_t S,
                  int64_t num_slots, const Slots& slots, int64_t d, float* p, T* out) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return some_queries<T, ROWS - 1>(rows, q, k, v, mask, S, num_slots, slots, d, p, out);
  head<T, ROWS>(q, k, v, mask, S, num_slots, slots, d, p, out);
}

template <typename T>
void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
            float scale, const int64_t* table, at::Tensor& out) {
  const int64_t H = q.size(1), num_queries = q.size(2), d = q.size(3), S = mask.size(3);
  const int64_t K = k.size(1), size = k.size(2), group = H / K;
  const T* queries = q.const_data_ptr<T>();
  const T* keys = k.const_data_ptr<T>();
  const T* values = v.const_data_ptr<T>();
  const bool* allowed = mask.const_data_ptr<bool>();
  T* outputs = out.mutable_data_ptr<T>();

  at::parallel_for(0, q.size(0) * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scaled(num_queries * d), probs(num_queries * (S + LANES));
    for (int64_t n = begin; n < end; n++) {
      const bool* rows = allowed + n / H * num_queries * S;
      // Slots behind the last one that any query may see were not written yet, and need not be read.
      int64_t num_slots = 0;
      for (int64_t m = 0; m < num_queries; m++)
        for (int64_t s = S; s > num_slots; s--)
          if (rows[m * S + s - 1]) num_slots = s;
      for (int64_t i = 0; i < num_queries * d; i++) scaled[i] = scale * queries[n * num_queries * d + i];
      // Heads of a group read one k and v. With a table, the row's number is in it, else in the memory.
      const int64_t row = n / H, pair = n % H / group;
      Slots slots{size, {}};
      for (int64_t s = 0; s < num_slots; s += size)
        slots.offsets.push_back(((table ? table[row * (S / size) + s / size] : row) * K + pair) * size * d);
      some_queries<T>(num_queries, scaled.data(), keys, values, rows, S, num_slots, slots, d, probs.data(),
                      outputs + n * num_queries * d);
    }
  });
}

// q (B, H, T, d), k and v (B, K, S, d), all fp32 or all bf16, mask (B, 1, T, S) -> (B, H, T, d)
// With a table (B, n): k and v are blocks (N, K, size, d), of which row b has table[b], and S = n size.
at::Tensor row_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& mask, double scale, const std::optional<at::Tensor>& table) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(2) && k.size(1), "q, k and v do not fit");
  TORCH_CHECK(q.size(2) <= MAX_QUERIES, q.size(2), " queries of a head are more than ", MAX_QUERIES);
  TORCH_CHECK(q.size(3) % FEATURES == 0, "heads of ", q.size(3), " are no multiple of ", FEATURES);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(3) == q.size(3) && q.size(1) % k.size(1) == 0 &&
                  q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "q, k and v do not fit");
  int64_t S = k.size(2), num_rows = k.size(0);
  at::Tensor blocks;
  if (table) {
    TORCH_CHECK(table->dim() == 2 && table->scalar_type() == at::kLong, "the table does not fit");
    blocks = table->contiguous();
    const auto [least, most] = at::aminmax(blocks);
    TORCH_CHECK(least.item<int64_t>() >= 0 && most.item<int64_t>() < k.size(0), "no such block");
    S *= blocks.size(1), num_rows = blocks.size(0);
  }
  TORCH_CHECK(num_rows == q.size(0), "q, k and v do not fit");
  TORCH_CHECK(mask.sizes() == at::IntArrayRef({q.size(0), 1, q.size(2), S}), "the mask does not fit");
  const at::Tensor queries = q.contiguous();
  at::Tensor out = at::empty_like(queries);
  auto* const in_dtype = q.scalar_type() == at::kFloat ? attend<float> : attend<at::BFloat16>;
  in_dtype(queries, k.contiguous(), v.contiguous(), mask.contiguous(), scale,
           table ? blocks.const_data_ptr<int64_t>() : nullptr, out);
  return out;
}

// Whether it gives a sum that is known: scores of 0, ln 2 and ln 5 weigh the values by 1, 2 and 5 eighths.
template <typename T>
bool gives_known_sum() {
  constexpr int S = 4, d = FEATURES;  // of the slots the mask hides the last
  const float scores[S] = {0, std::log(2.0f), std::log(5.0f), 9};
  const bool mask[S] = {true, true, true, false};
  float q[d] = {1}, p[S + 16];
  T k[S * d] = {}, v[S * d], out[d];
  for (int s = 0; s < S; s++) k[s * d] = scores[s];
  for (int i = 0; i < S * d; i++) v[i] = i * 5 % 17;
  some_queries<T>(1, q, k, v, mask, S, S, Slots{S, {0}}, d, p, out);
  for (int i = 0; i < d; i++) {
    const float known = (float(v[i]) + 2 * float(v[d + i]) + 5 * float(v[2 * d + i])) / 8;
    if (!(std::abs(float(out[i]) - known) < (sizeof(T) == 4 ? 1e-4f : 0.2f))) return false;
  }
  return true;
}
bool works() { return gives_known_sum<float>() && gives_known_sum<at::BFloat16>(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(zoo, library) {
  library.def(
      "row_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale, Tensor? table=None) -> Tensor");
  library.def("row_attention_works() -> bool", works);
}
TORCH_LIBRARY_IMPL(zoo, CPU, library) { library.impl("row_attention", row_attention); }
