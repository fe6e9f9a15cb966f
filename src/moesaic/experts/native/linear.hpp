// A linear layer: one matrix by the same products as an expert's.
#pragma once
#include "forward.hpp"

namespace moesaic::MOESAIC_VARIANT {

template <class Kind, class Format>
struct Linear {
  typedef typename Kind::Element Element;
  const MoesaicLinear& layer;
  Features<Kind, Format> x;
  const Element** rows;
  Workspace* workspaces;
  Counter* counters;

  explicit Linear(const MoesaicLinear& of) : layer(of) {}

  void plan(Arena& arena) {
    x.plan(arena, layer.x, layer.x_stride, layer.tokens, layer.inputs);
    rows = arena.take<const Element*>(layer.tokens);
    workspaces = arena.take<Workspace>(layer.threads);
    counters = arena.take<Counter>(2);
  }

  // One thread's part.
  void work() {
    if (!x.direct) {
      for (int64_t token; (token = counters[0].next()) < layer.tokens;) x.convert(token);
#pragma omp barrier
    }
    const Matrix matrix = matrix_of(layer.weight, 0, layer.outputs, layer.inputs);
    const int64_t blocks = (layer.outputs + 2 * W - 1) / (2 * W), size = share(blocks, layer.threads, 8);
    for_items(counters[1], (blocks + size - 1) / size, [&](int64_t item, int64_t following) {
      const int64_t from = item * size, to = from + size < blocks ? from + size : blocks;
      for (int64_t b = from; b < to; ++b) {
        const int64_t next = b + 1 < to ? b + 1 : following * size;
        const Ahead ahead = next < blocks ? ahead_of(matrix, plain_block(next, layer.outputs)) : Ahead{};
        outputs(matrix, plain_block(b, layer.outputs), ahead);
      }
    });
  }

  void outputs(const Matrix& matrix, const Block& block, const Ahead& ahead) {
    F bias[2];
    for (int v = 0; v < 2; ++v) bias[v] = bias_of<Format>(layer.weight.bias, block.first[v], block.count[v]);
    product<Kind>(matrix, block, rows, layer.tokens, layer.inputs, layer.row_invariant, workspaces[thread_number()],
                  ahead, [&](int64_t begin, int count, const float* sums) {
                    for (int r = 0; r < count; ++r, sums += 2 * W) {
                      auto* to = static_cast<typename Format::Element*>(layer.out) + (begin + r) * layer.outputs;
                      for (int v = 0; v < 2; ++v)
                        store_up_to(Format(), to + block.first[v], read<F>(sums + v * W) + bias[v], block.count[v]);
                    }
                  });
  }

  int run() {
    Arena arena = {nullptr, 0};
    plan(arena);
    void* const scratch = borrow_scratch(arena.used);
    if (!scratch) return 1;
    arena = {static_cast<char*>(scratch), 0};
    plan(arena);
    memset(counters, 0, sizeof(Counter) * 2);
    for (int64_t t = 0; t < layer.tokens; ++t) rows[t] = x.row(t);
#pragma omp parallel num_threads(layer.threads)
    work();
    return_scratch(scratch);
    return 0;
  }
};

}  // namespace moesaic::MOESAIC_VARIANT
