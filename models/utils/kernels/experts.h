// Rows of x that go through the matrices of experts: those of one expert follow each other, and share what is
// read.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

namespace {

// Rows of x, `count` from `first` on, that go through the same matrix.
struct Run {
  int64_t matrix, first, count;
};

// Row n of the runs is row order[n] of the result.
struct Sorted {
  std::vector<int64_t> order;
  std::vector<Run> runs;
};

// Row m of the result, of num_rows, goes through matrix experts[m] of num_matrices; without experts all through
// the only one.
Sorted sort_by_expert(int64_t num_rows, const std::optional<at::Tensor>& experts, int64_t num_matrices) {
  Sorted sorted = {std::vector<int64_t>(num_rows), {{0, 0, num_rows}}};
  auto& [order, runs] = sorted;
  std::iota(order.begin(), order.end(), 0);
  if (!experts) return sorted;
  TORCH_CHECK(experts->numel() == num_rows, "each row needs an expert");

  const at::Tensor numbers = experts->contiguous();
  const int64_t* matrices = numbers.const_data_ptr<int64_t>();
  const auto earlier = [&](int64_t a, int64_t b) { return matrices[a] < matrices[b]; };
  std::stable_sort(order.begin(), order.end(), earlier);
  runs.clear();
  for (int64_t n = 0; n < num_rows; n++) {
    if (n == 0 || matrices[order[n]] != matrices[order[n - 1]]) runs.push_back({matrices[order[n]], n, 0});
    runs.back().count++;
  }
  const bool known = runs.empty() || (runs.front().matrix >= 0 && runs.back().matrix < num_matrices);
  TORCH_CHECK(known, "no such expert");
  return sorted;
}

}  // namespace
