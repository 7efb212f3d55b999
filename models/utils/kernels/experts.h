// Rows of x that go through the matrices of experts: those of one expert follow each other, and share what is
// read.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>

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

// x (M, K), sorted, with its runs: row n of it was row order[n].
struct Sorted {
  at::Tensor rows;
  std::vector<int64_t> order;
  std::vector<Run> runs;
};

// Row m of x (M, K) goes through matrix experts[m] of num_matrices; without experts all through the only one.
Sorted sort_by_expert(const at::Tensor& x, const std::optional<at::Tensor>& experts, int64_t num_matrices) {
  Sorted sorted = {x, std::vector<int64_t>(x.size(0)), {{0, 0, x.size(0)}}};
  auto& [rows, order, runs] = sorted;
  std::iota(order.begin(), order.end(), 0);
  if (!experts) return sorted;
  TORCH_CHECK(experts->numel() == x.size(0), "each row of x needs an expert");

  const at::Tensor numbers = experts->contiguous();
  const int64_t* matrices = numbers.const_data_ptr<int64_t>();
  const auto earlier = [&](int64_t a, int64_t b) { return matrices[a] < matrices[b]; };
  std::stable_sort(order.begin(), order.end(), earlier);
  runs.clear();
  for (int64_t n = 0; n < numbers.numel(); n++) {
    if (n == 0 || matrices[order[n]] != matrices[order[n - 1]]) runs.push_back({matrices[order[n]], n, 0});
    runs.back().count++;
  }
  const bool known = runs.empty() || (runs.front().matrix >= 0 && runs.back().matrix < num_matrices);
  TORCH_CHECK(known, "no such expert");
  rows = x.index_select(0, at::tensor(order));
  return sorted;
}

}  // namespace
