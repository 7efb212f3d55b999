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
#include <optional>
#include <vector>

#include "experts.h"
#include "tile_dots.h"

namespace {

constexpr int LANES = 32;          // outputs in a tile
constexpr int MAX_ROWS = 8;        // rows of x that share each weight that is loaded
constexpr int HEADER = 4 * LANES;  // bytes of scales before the codes, in int4 with their zeros
constexpr int AHEAD = 8192;        // bytes: how far in front of the sums codes are asked for in 8 bits

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
void plain_rows(int rows, const uint8_t* tile, const Block* x, int64_t num_groups, int64_t per_group,
                float* out) {
  const int64_t num_blocks = num_groups * per_group;
  float scale[LANES] = {}, zero[LANES];
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
      for (int n = 0; n < LANES; n++) {
        float sum = static_cast<float>(dot[n]);
        if (BITS == 4) sum = std::fma(scale[n], sum, zero[n] * block.sum);
        out[m * LANES + n] = std::fma(sum, block.scale, out[m * LANES + n]);
      }
    }
    tile += INPUTS * LANES * BITS / 8;
  }
  if (BITS == 8)  // where a row of the weight is one group, and its scale can wait until here
    for (int i = 0; i < rows * LANES; i++) out[i] *= scale[i % LANES];
}

#if WIDTH
constexpr int VECTORS = LANES / WIDTH;  // of a tile
constexpr int TOGETHER = 2;             // of these: they share each activation that is loaded

INLINE Ints load(const uint8_t* at) {
  Ints vector;
  std::memcpy(&vector, at, sizeof vector);
  return vector;
}

// Asks for the vector that comes later at the place of this one, which is number v of its line of 128 bytes.
// Where there is much to do between two loads, a core that is not told reads and multiplies by turns. With
// a row or two in 8 bits loads follow each other so fast that it looks ahead by itself, and asking costs
// time. In 4 bits a core takes longer for a byte: from nearby, and into the first cache, was fastest.
template <int BITS, int ROWS>
INLINE void ask_ahead(const uint8_t* at, int v) {
  if (v * WIDTH % 16) return;  // memory comes in 64 bytes
  if constexpr (BITS == 4) __builtin_prefetch(at + AHEAD / 4, 0, 3);
  if constexpr (BITS == 8 && ROWS > 2) __builtin_prefetch(at + AHEAD, 0, 2);
}

// The same with vectors, in which a lane is an output.
template <int BITS, bool FLOATS, int ROWS>
void vector_loop(const uint8_t* tile, const Block* x, int64_t num_groups, int64_t per_group, float* out) {
  constexpr int BYTES = INPUTS * LANES * BITS / 8;  // of the codes of 32 inputs
  const int64_t num_blocks = num_groups * per_group;
  Floats total[ROWS][VECTORS] = {}, scale[VECTORS], zero[VECTORS];

  for (int64_t group = 0; group < num_groups; group++) {
    for (int v = 0; v < VECTORS; v++) {
      ask_ahead<BITS, ROWS>(tile + 4 * WIDTH * v, v);
      const Ints header = load(tile + 4 * WIDTH * v);
      // In int4 two bf16; such a number is the upper half of the fp32 of the same value.
      scale[v] = reinterpret_cast<Floats>(BITS == 8 ? header : header << 16);
      zero[v] = reinterpret_cast<Floats>(header & (Ints{} + 0xffff0000));
    }
    tile += HEADER;
    for (int64_t block = 0; block < per_group; block++, x++, tile += BYTES) {
      for (int from = 0; from < VECTORS; from += TOGETHER) {
        // As if memory had changed: otherwise GCC keeps the activations of all rows, on the stack, for later.
        asm volatile("" ::: "memory");
        Ints sums[ROWS][TOGETHER], first[TOGETHER], second[TOGETHER];  // 4 inputs of each output, the next 4
        for (int m = 0; m < ROWS; m++)
          for (int v = 0; v < TOGETHER; v++) sums[m][v] = begin<BITS, FLOATS>(x[m * num_blocks].start);
#pragma GCC unroll 4
        for (int k = 0; k < INPUTS / 4; k += 2) {
          for (int v = 0; v < TOGETHER; v++) {
            const uint8_t* at = tile + LANES * BITS / 2 * k + 4 * WIDTH * (from + v);
            ask_ahead<BITS, ROWS>(at, v);
            first[v] = load(at);
            if constexpr (BITS == 8) {
              ask_ahead<BITS, ROWS>(at + 4 * LANES, v);
              second[v] = load(at + 4 * LANES);
            } else {
              second[v] = first[v] >> 4 & 0x0f0f0f0f;
              first[v] = first[v] & 0x0f0f0f0f;
            }
            if constexpr (FLOATS) first[v] = levels_of(first[v]), second[v] = levels_of(second[v]);
          }
          for (int m = 0; m < ROWS; m++)
            for (int v = 0; v < TOGETHER; v++) {
              const int32_t* fours = x[m * num_blocks].fours + k;
              sums[m][v] = add_products<BITS, FLOATS>(sums[m][v], first[v], second[v], fours);
            }
        }

        for (int m = 0; m < ROWS; m++)
          for (int v = 0; v < TOGETHER; v++) {
            const Block& row = x[m * num_blocks];
            Floats sum = __builtin_convertvector(end<BITS, FLOATS>(sums[m][v], row.start), Floats);
            if constexpr (BITS == 4) sum = multiply_add(scale[from + v], sum, zero[from + v] * row.sum);
            total[m][from + v] = multiply_add(sum, Floats{} + row.scale, total[m][from + v]);
          }
      }
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) {
      if constexpr (BITS == 8) total[m][v] *= scale[v];
      std::memcpy(out + m * LANES + v * WIDTH, &total[m][v], sizeof(Floats));
    }
}

// The number of rows is a constant of the loop, so that all its sums stay in registers.
template <int BITS, bool FLOATS, int ROWS = MAX_ROWS>
void vector_rows(int rows, const uint8_t* tile, const Block* x, int64_t num_groups, int64_t per_group,
                 float* out) {
  if (rows == ROWS) return vector_loop<BITS, FLOATS, ROWS>(tile, x, num_groups, per_group, out);
  if constexpr (ROWS > 1) vector_rows<BITS, FLOATS, ROWS - 1>(rows, tile, x, num_groups, per_group, out);
}
#endif

bool has_vector_loop() { return WIDTH > 0; }
template <int BITS, bool FLOATS>
auto* choose(bool plain) {
#if WIDTH
  if (!plain) return vector_rows<BITS, FLOATS>;
#endif
  return plain_rows<BITS, FLOATS>;
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
  const at::Tensor rows = x.reshape({-1, K}).contiguous();
  const int64_t num_rows = rows.size(0), each = experts ? experts->numel() / std::max<int64_t>(1, num_rows) : 1;
  TORCH_CHECK(each > 0 && (!experts || experts->numel() == each * num_rows), "each row of x needs as many experts");
  const auto [order, runs] = sort_by_expert(each * num_rows, experts, tiles.size(0));
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

// Whether each loop gives sums that are known, for each number of rows: of whole numbers and halves, with the
// largest codes that there are.
template <int BITS, bool FLOATS>
bool gives_known_sums() {
  constexpr int BYTES = INPUTS * LANES * BITS / 8;
  constexpr uint8_t ENDS[] = {255, 1, 0x77};  // the largest and the least code, and MXFP4's largest number
  uint8_t tile[HEADER + BYTES];
  float x[MAX_ROWS * INPUTS], plain[MAX_ROWS * LANES], out[MAX_ROWS * LANES];
  Block blocks[MAX_ROWS];
  const uint32_t one = std::bit_cast<uint32_t>(1.0f), half = std::bit_cast<uint32_t>(0.5f);
  const uint32_t header = BITS == 8 ? one : half | one >> 16;  // scale 1, and in 4 bits zero .5
  for (int n = 0; n < LANES; n++) std::memcpy(tile + 4 * n, &header, 4);
  for (int i = 0; i < BYTES; i++) {
    const int n = i / 4 % LANES;
    tile[HEADER + i] = n < 3 ? ENDS[n] : i * 37;
  }
  for (int i = 0; i < MAX_ROWS * INPUTS; i++) x[i] = i < INPUTS || i % INPUTS == 0 ? 127 : i * 29 % 255 - 127;
  quantize<BITS>(x, blocks, MAX_ROWS);

  for (int rows = 1; rows <= MAX_ROWS; rows++) {
    plain_rows<BITS, FLOATS>(rows, tile, blocks, 1, 1, plain);
    choose<BITS, FLOATS>(false)(rows, tile, blocks, 1, 1, out);
    for (int i = 0; i < rows * LANES; i++) {
      float known = 0;
      for (int k = 0; k < INPUTS; k++) {
        const int at = (BITS == 8 ? k / 4 : k / 8) * 4 * LANES + i % LANES * 4 + k % 4;
        const int byte = tile[HEADER + at], code = k / 4 % 2 ? byte >> 4 : byte & 15;
        const float weight = BITS == 8 ? byte - 128 : (FLOATS ? LEVELS[code] : code) - 8 + 0.5f;
        known += weight * x[i / LANES * INPUTS + k];
      }
      if (plain[i] != known || out[i] != known) return false;
    }
  }
  return true;
}
bool works() {
  return gives_known_sums<8, false>() && gives_known_sums<4, false>() && gives_known_sums<4, true>();
}

}  // namespace

TORCH_LIBRARY(zoo, library) {
  library.def(
      "tiled_linear(Tensor x, Tensor tiles, int num_outputs, int bits, bool plain=False, "
      "Tensor? experts=None, bool floats=False) -> Tensor");
  library.def("has_vector_loop() -> bool", has_vector_loop);
  library.def("tiled_linear_works() -> bool", works);
}
TORCH_LIBRARY_IMPL(zoo, CPU, library) { library.impl("tiled_linear", tiled_linear); }
