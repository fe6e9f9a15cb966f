// Linear layers of one shape, each for its own rows: by the same products as an expert's.
#pragma once
#include "forward.hpp"

namespace moesaic::MOESAIC_VARIANT {

template <class Kind, class Format>
struct Linear {
  typedef typename Kind::Element Element;
  const MoesaicLinear& layer;
  Features<Kind, Format> x;
  const Element** rows;
  int32_t* active;  // [groups] those that have rows
  int64_t num_active = 0;
  Workspace* workspaces;
  Counter* counters;

  explicit Linear(const MoesaicLinear& of) : layer(of) {}

  void plan(Arena& arena) {
    x.plan(arena, layer.x, layer.x_stride, layer.tokens, layer.inputs);
    rows = arena.take<const Element*>(layer.tokens);
    active = arena.take<int32_t>(layer.groups);
    workspaces = arena.take<Workspace>(layer.threads);
    counters = arena.take<Counter>(2);
  }

  // One thread's part.
  void work() {
    if (!x.direct) {
      for (int64_t token; (token = counters[0].next()) < layer.tokens;) x.convert(token);
#pragma omp barrier
    }
    const int64_t blocks = (layer.outputs + 2 * W - 1) / (2 * W), size = share(blocks * num_active, layer.threads, 8);
    const int64_t shares = (blocks + size - 1) / size, items = shares * num_active;
    for_items(counters[1], items, [&](int64_t item, int64_t following) {
      const int32_t group = active[item / shares];
      const int64_t from = item % shares * size, to = from + size < blocks ? from + size : blocks;
      for (int64_t b = from; b < to; ++b) {
        const Ahead ahead = b + 1 < to          ? ahead_of(matrix(group), plain_block(b + 1, layer.outputs))
                            : following < items ? ahead_of(matrix(active[following / shares]),
                                                           plain_block(following % shares * size, layer.outputs))
                                                : Ahead{};
        outputs(group, plain_block(b, layer.outputs), ahead);
      }
    });
  }

  Matrix matrix(int32_t group) const { return matrix_of(layer.weight, group, layer.outputs, layer.inputs); }
  int64_t first_row(int32_t group) const { return group ? layer.offsets[group - 1] : 0; }

  void outputs(int32_t group, const Block& block, const Ahead& ahead) {
    F bias[2];
    for (int v = 0; v < 2; ++v)
      bias[v] = bias_of<Format>(layer.weight.bias, group * layer.outputs + block.first[v], block.count[v]);
    const int64_t first = first_row(group);
    product<Kind>(matrix(group), block, rows + first, layer.offsets[group] - first, layer.inputs, layer.row_invariant,
                  workspaces[thread_number()], ahead, [&](int64_t begin, int count, const float* sums) {
                    for (int r = 0; r < count; ++r, sums += 2 * W) {
                      auto* to = static_cast<typename Format::Element*>(layer.out) + (first + begin + r) * layer.outputs;
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
    for (int32_t g = 0; g < layer.groups; ++g)
      if (layer.offsets[g] > first_row(g)) active[num_active++] = g;
#pragma omp parallel num_threads(layer.threads)
    work();
    return_scratch(scratch);
    return 0;
  }
};

}  // namespace moesaic::MOESAIC_VARIANT
