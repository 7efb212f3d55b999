// Rows of activations times a matrix in 8 or 4 bits. tiled_linear.py builds this page and explains it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 32;    // outputs in a tile: two vectors of 16 numbers of 32 bits
constexpr int VECTORS = 2;   // they share each activation that is loaded
constexpr int INPUTS = 32;   // activations that share a scale
constexpr int MAX_ROWS = 8;  // rows of x that share each weight that is loaded
constexpr int HEADER = 4 * LANES;  // bytes of scales before the codes, in int4 with their zeros
constexpr int AHEAD = 8192;  // bytes: how far in front of the sums codes are asked for in 8 bits

// Twice the numbers of 4-bit floats (MXFP4), + 12 so that none is negative; of -0 as of 0.
alignas(16) constexpr uint8_t LEVELS[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// INPUTS activations of a row: each is scale * code.
struct Block {
  float scale;
  float sum;      // of the codes, for the zeros of the weights
  int32_t start;  // of the integer sum of q * code, which so becomes that of (q - 128) * code, int4: q - 8
  union {
    int8_t codes[INPUTS];
    int32_t fours[INPUTS / 4];  // what one lane of the dot-product instruction takes
  };
};

template <int BITS, typename T>
void quantize(const T* x, Block* blocks, int64_t num_blocks) {
  for (int64_t b = 0; b < num_blocks; b++, x += INPUTS) {
    float values[INPUTS];
    uint32_t largest_bits = 0;
    for (int k = 0; k < INPUTS; k++) values[k] = static_cast<float>(x[k]);
    // Without their sign, floats are in the order of their bits: infinity after all numbers, then NaN.
    for (int k = 0; k < INPUTS; k++)
      largest_bits = std::max(largest_bits, std::bit_cast<uint32_t>(values[k]) & 0x7fffffff);
    const float largest = std::bit_cast<float>(largest_bits);
    const bool finite = std::isfinite(largest);
    if (!finite) std::fill(values, values + INPUTS, 0.0f);

    // Blocks of less than this are zeros; dividing by them could overflow.
    const float inverse = largest > 1e-30f ? 127 / largest : 0;
    int32_t sum = 0, codes[INPUTS];
    for (int k = 0; k < INPUTS; k++) codes[k] = static_cast<int32_t>(std::nearbyint(values[k] * inverse));
    for (int k = 0; k < INPUTS; k++) sum += codes[k];
    for (int k = 0; k < INPUTS; k++) blocks[b].codes[k] = static_cast<int8_t>(codes[k]);
    blocks[b].scale = finite ? largest / 127 : std::numeric_limits<float>::quiet_NaN();
    blocks[b].sum = static_cast<float>(sum);
    blocks[b].start = -(1 << (BITS - 1)) * sum;
  }
}

template <bool FLOATS>
inline int32_t level(uint32_t code) {
  return FLOATS ? LEVELS[code] : code;
}

// What a tile gives for some rows of x, without a word about vectors: out[m][n] is row m times output n.
template <int BITS, bool FLOATS>
void plain_rows(int rows, const uint8_t* tile, const Block* x, int64_t num_groups,
                          int64_t per_group, float* out) {
  const int64_t num_blocks = num_groups * per_group;
  float scale[LANES], zero[LANES];
  uint32_t first[LANES], second[LANES];  // 4 inputs of each output, a byte each, and the next 4
  std::fill(out, out + rows * LANES, 0.0f);

  for (int64_t b = 0; b < num_blocks; b++) {
    if (b % per_group == 0) {
      std::memcpy(first, tile, HEADER);
      for (int n = 0; n < LANES; n++) scale[n] = std::bit_cast<float>(BITS == 8 ? first[n] : first[n] << 16);
      for (int n = 0; n < LANES; n++) zero[n] = BITS == 8 ? 0 : std::bit_cast<float>(first[n] & 0xffff0000);
      tile += HEADER;
    }
    for (int m = 0; m < rows; m++) {
      const Block& block = x[m * num_blocks + b];
      int32_t dot[LANES];
      std::fill(dot, dot + LANES, block.start);
      for (int k = 0; k < INPUTS; k += 8) {
        const uint8_t* codes = tile + k * LANES * BITS / 8;
        std::memcpy(first, codes, sizeof first);
        if (BITS == 8) {
          std::memcpy(second, codes + sizeof first, sizeof second);
        } else {
          for (int n = 0; n < LANES; n++) second[n] = first[n] >> 4 & 0x0f0f0f0f;
          for (int n = 0; n < LANES; n++) first[n] &= 0x0f0f0f0f;
        }
        for (int j = 0; j < 4; j++)
          for (int n = 0; n < LANES; n++)
            dot[n] += level<FLOATS>(first[n] >> 8 * j & 255) * block.codes[k + j] +
                      level<FLOATS>(second[n] >> 8 * j & 255) * block.codes[k + 4 + j];
      }
      for (int n = 0; n < LANES; n++)
        out[m * LANES + n] += (scale[n] * static_cast<float>(dot[n]) + zero[n] * block.sum) * block.scale;
    }
    tile += INPUTS * LANES * BITS / 8;
  }
}

#ifdef __AVX512VNNI__
template <int BITS, int ROWS>
inline __m512i load(const uint8_t* at) {
  // Where there is much to do between two loads, a core that is not told reads and multiplies by turns. With
  // a row or two in 8 bits loads follow each other so fast that it looks ahead by itself, and asking costs
  // time. In 4 bits a core takes longer for a byte: from nearby, and into the first cache, was fastest.
  if constexpr (BITS == 4) _mm_prefetch(at + AHEAD / 4, _MM_HINT_T0);
  if constexpr (BITS == 8 && ROWS > 2) _mm_prefetch(at + AHEAD, _MM_HINT_T1);
  return _mm512_loadu_si512(at);
}

// The same with vectors of 512 bits, in which a lane is an output: 16 sums grow side by side.
template <int BITS, bool FLOATS, int ROWS>
void vector_loop(const uint8_t* tile, const Block* x, int64_t num_groups, int64_t per_group,
                      float* out) {
  const __m512i low_half = _mm512_set1_epi8(15), high_bits = _mm512_set1_epi32(0xffff0000);
  const __m512i levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(LEVELS)));
  const int64_t num_blocks = num_groups * per_group;
  __m512 total[ROWS][VECTORS] = {}, scale[VECTORS], zero[VECTORS];
  __m512i dot[ROWS][VECTORS], first[VECTORS], second[VECTORS];  // 4 inputs of 16 outputs, and the next 4

  for (int64_t group = 0; group < num_groups; group++) {
    for (int v = 0; v < VECTORS; v++) {
      const __m512i header = load<BITS, ROWS>(tile + 64 * v);
      // In int4 two bf16; such a number is the upper half of the fp32 of the same value.
      scale[v] = _mm512_castsi512_ps(BITS == 8 ? header : _mm512_slli_epi32(header, 16));
      zero[v] = _mm512_castsi512_ps(_mm512_and_si512(header, high_bits));
    }
    tile += HEADER;
    for (int64_t block = 0; block < per_group; block++, x++) {
      for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) dot[m][v] = _mm512_set1_epi32(x[m * num_blocks].start);

#pragma GCC unroll 4
      for (int k = 0; k < INPUTS / 4; k += 2, tile += LANES * BITS) {
        for (int v = 0; v < VECTORS; v++) {
          first[v] = load<BITS, ROWS>(tile + 64 * v);
          if constexpr (BITS == 8) {
            second[v] = load<BITS, ROWS>(tile + 64 * (VECTORS + v));
          } else {
            second[v] = _mm512_and_si512(_mm512_srli_epi16(first[v], 4), low_half);
            first[v] = _mm512_and_si512(first[v], low_half);
          }
          if constexpr (FLOATS) {
            first[v] = _mm512_shuffle_epi8(levels, first[v]);
            second[v] = _mm512_shuffle_epi8(levels, second[v]);
          }
        }
        for (int m = 0; m < ROWS; m++) {
          const __m512i x_first = _mm512_set1_epi32(x[m * num_blocks].fours[k]);
          const __m512i x_second = _mm512_set1_epi32(x[m * num_blocks].fours[k + 1]);
          for (int v = 0; v < VECTORS; v++) {
            // In each of 16 lanes: 4 codes of a weight's row times 4 codes of x, all added to the lane.
            dot[m][v] = _mm512_dpbusd_epi32(dot[m][v], first[v], x_first);
            dot[m][v] = _mm512_dpbusd_epi32(dot[m][v], second[v], x_second);
          }
        }
      }

      for (int m = 0; m < ROWS; m++) {
        const __m512 x_scale = _mm512_set1_ps(x[m * num_blocks].scale);
        const __m512 x_sum = _mm512_set1_ps(x[m * num_blocks].sum);
        for (int v = 0; v < VECTORS; v++) {
          __m512 sum = _mm512_cvtepi32_ps(dot[m][v]);
          if constexpr (BITS == 4) sum = _mm512_fmadd_ps(scale[v], sum, _mm512_mul_ps(zero[v], x_sum));
          total[m][v] = _mm512_fmadd_ps(sum, x_scale, total[m][v]);
        }
      }
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) {
      // In int8 a row of the weight is one group, and its scale can wait until here.
      if constexpr (BITS == 8) total[m][v] = _mm512_mul_ps(total[m][v], scale[v]);
      _mm512_storeu_ps(out + m * LANES + v * 16, total[m][v]);
    }
}

// The number of rows is a constant of the loop, so that all its sums stay in registers.
template <int BITS, bool FLOATS, int ROWS = MAX_ROWS>
void vector_rows(int rows, const uint8_t* tile, const Block* x, int64_t num_groups, int64_t per_group,
                 float* out) {
  if (rows == ROWS) return vector_loop<BITS, FLOATS, ROWS>(tile, x, num_groups, per_group, out);
  if constexpr (ROWS > 1) vector_rows<BITS, FLOATS, ROWS - 1>(rows, tile, x, num_groups, per_group, out);
}
bool has_vector_loop() { return true; }
template <int BITS, bool FLOATS>
auto* choose(bool plain) {
  return plain ? plain_rows<BITS, FLOATS> : vector_rows<BITS, FLOATS>;
}

#else
bool has_vector_loop() { return false; }
template <int BITS, bool FLOATS>
auto* choose(bool) {
  return plain_rows<BITS, FLOATS>;
}
#endif

// Rows of x, `count` from `first` on, that go through the same matrix.
struct Run {
  int64_t matrix, first, count;
};

// The order that brings rows of the same expert together, and the runs that they make in it.
std::vector<Run> sort_by_expert(const at::Tensor& experts, std::vector<int64_t>& order) {
  const int64_t* matrices = experts.const_data_ptr<int64_t>();
  order.resize(experts.numel());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return matrices[a] < matrices[b]; });
  std::vector<Run> runs;
  for (int64_t n = 0; n < experts.numel(); n++) {
    if (n == 0 || matrices[order[n]] != matrices[order[n - 1]]) runs.push_back({matrices[order[n]], n, 0});
    runs.back().count++;
  }
  return runs;
}

// Row n of the runs is row order[n] of out, each row of x makes `each` of them; tiles (E, N / 32, K / g, bytes)
template <int BITS, bool FLOATS, typename T>
void multiply(const at::Tensor& x, const at::Tensor& tiles, at::Tensor& out, const std::vector<Run>& runs,
              const std::vector<int64_t>& order, int64_t each, bool plain) {
  const int64_t num_rows = x.size(0), num_blocks = x.size(1) / INPUTS, num_outputs = out.size(1);
  const int64_t num_tiles = tiles.size(1), num_groups = tiles.size(2), per_group = num_blocks / num_groups;
  const T* inputs = x.const_data_ptr<T>();
  const uint8_t* weights = tiles.const_data_ptr<uint8_t>();
  T* outputs = out.mutable_data_ptr<T>();
  auto* const rows_times_tile = choose<BITS, FLOATS>(plain);

  std::vector<Block> blocks(num_rows * num_blocks);
  at::parallel_for(0, num_rows, MAX_ROWS, [&](int64_t begin, int64_t end) {
    quantize<BITS>(inputs + begin * x.size(1), &blocks[begin * num_blocks], (end - begin) * num_blocks);
  });
  if (each > 1 || runs.size() > 1) {
    std::vector<Block> sorted;
    sorted.reserve(order.size() * num_blocks);
    for (const int64_t row : order) {
      const auto from = blocks.begin() + row / each * num_blocks;
      sorted.insert(sorted.end(), from, from + num_blocks);
    }
    blocks = std::move(sorted);
  }
  at::parallel_for(0, runs.size() * num_tiles, 4, [&](int64_t begin, int64_t end) {
    float lanes[MAX_ROWS * LANES];
    for (int64_t job = begin; job < end; job++) {
      const auto [matrix, first, in_run] = runs[job / num_tiles];
      const int64_t n = job % num_tiles, width = std::min<int64_t>(LANES, num_outputs - n * LANES);
      const uint8_t* tile = weights + matrix * tiles.stride(0) + n * tiles.stride(1);
      // Tiles come from memory for the first rows of x; for all others they are in the core's own cache.
      for (int64_t row = first; row < first + in_run; row += MAX_ROWS) {
        const int rows = std::min<int64_t>(MAX_ROWS, first + in_run - row);
        rows_times_tile(rows, tile, &blocks[row * num_blocks], num_groups, per_group, lanes);
        for (int m = 0; m < rows; m++)
          std::copy_n(lanes + m * LANES, width, outputs + order[row + m] * num_outputs + n * LANES);
      }
    }
  });
}

// x (..., K), tiles (N / 32, K / g, HEADER + 32 g bits / 8) -> (..., num_outputs), in the dtype of x.
// floats: 4-bit codes stand for LEVELS. With experts (M A): row m of x (M, K) goes through the matrices experts[m A]
// to experts[m A + A - 1] of tiles (E, N / 32, ...), which gives (M A, num_outputs).
at::Tensor tiled_linear(const at::Tensor& x, const at::Tensor& tiles, int64_t num_outputs, int64_t bits,
                        bool plain, const std::optional<at::Tensor>& experts, bool floats) {
  const int64_t K = x.size(-1), width = tiles.size(-2) * ((tiles.size(-1) - HEADER) * 8 / (LANES * bits));
  TORCH_CHECK(K == width, "x has ", K, " inputs, not ", width);
  TORCH_CHECK(tiles.dim() == (experts ? 4 : 3), "experts go with several matrices");
  at::Tensor rows = x.reshape({-1, K}).contiguous();
  const int64_t each = experts ? experts->numel() / std::max<int64_t>(1, rows.size(0)) : 1;
  std::vector<int64_t> order(rows.size(0));
  std::vector<Run> runs = {{0, 0, rows.size(0)}};
  std::iota(order.begin(), order.end(), 0);
  if (experts) {
    TORCH_CHECK(each > 0 && experts->numel() == each * rows.size(0), "each row of x needs as many experts");
    runs = sort_by_expert(experts->contiguous(), order);
    TORCH_CHECK(runs.front().matrix >= 0 && runs.back().matrix < tiles.size(0), "no such expert");
  }
  const at::Tensor matrices = experts ? tiles : tiles.unsqueeze(0);
  at::Tensor out = at::empty({each * rows.size(0), num_outputs}, x.options());
  const bool in_fp32 = x.scalar_type() == at::kFloat;
  auto* const in_8_bits = in_fp32 ? multiply<8, false, float> : multiply<8, false, at::BFloat16>;
  auto* const in_4_bits = in_fp32 ? multiply<4, false, float> : multiply<4, false, at::BFloat16>;
  auto* const in_floats = in_fp32 ? multiply<4, true, float> : multiply<4, true, at::BFloat16>;
  (floats ? in_floats : bits == 8 ? in_8_bits : in_4_bits)(rows, matrices, out, runs, order, each, plain);
  std::vector<int64_t> shape = x.sizes().vec();
  if (each > 1) shape = {each * rows.size(0), num_outputs};
  shape.back() = num_outputs;
  return out.view(shape);
}

}  // namespace

TORCH_LIBRARY(zoo, library) {
  library.def(
      "tiled_linear(Tensor x, Tensor tiles, int num_outputs, int bits, bool plain=False, "
      "Tensor? experts=None, bool floats=False) -> Tensor");
  library.def("has_vector_loop() -> bool", has_vector_loop);
}
TORCH_LIBRARY_IMPL(zoo, CPU, library) { library.impl("tiled_linear", tiled_linear); }
